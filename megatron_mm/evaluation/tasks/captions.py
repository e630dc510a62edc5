"""Captions: COCO (Karpathy's split), NoCaps, TextCaps; CIDEr-D times 100."""

from __future__ import annotations

from pathlib import Path

from megatron_mm.evaluation.metrics.cider import caption_scores
from megatron_mm.evaluation.tasks.base import Example, ImageSource, Split, Task, annotated, parsed, read_json

_KARPATHY = "dataset_coco.json"


def karpathy(path: Path, images: Path, *, splits: tuple[str, ...]) -> list[Example]:
    """Read the images of some of Karpathy's splits (`restval` belongs to training), each with all of its captions."""

    def rows() -> list[Example]:
        return [
            Example(
                key=str(row["cocoid"]),
                images=(ImageSource(images / row["filepath"] / row["filename"]),),
                answers=tuple(sentence["raw"].strip() for sentence in row["sentences"]),
            )
            for row in read_json(path)["images"]
            if row["split"] in splits
        ]

    return parsed(path, rows)


def coco_style(path: Path, folder: Path) -> list[Example]:
    """Read a file with `images` (id, file_name) and `annotations` (image_id, caption), the format of COCO and NoCaps."""

    def rows() -> list[Example]:
        fields = read_json(path)
        captions: dict[int, list[str]] = {}
        for row in fields["annotations"]:
            captions.setdefault(row["image_id"], []).append(row["caption"].strip())
        return [
            Example(
                key=str(row["id"]),
                images=(ImageSource(folder / row["file_name"]),),
                answers=tuple(captions[row["id"]]),
                category=str(row.get("domain", "")),
            )
            for row in fields["images"]
            if row["id"] in captions
        ]

    return parsed(path, rows)


def textcaps(path: Path, folder: Path) -> list[Example]:
    """Read TextCaps, whose rows hold one caption each; an image has several rows."""

    def rows() -> list[Example]:
        captions: dict[str, list[str]] = {}
        for row in read_json(path)["data"]:
            given = row.get("reference_strs") or [row["caption_str"]]
            kept = captions.setdefault(str(row["image_id"]), [])
            kept += [caption for caption in given if caption not in kept]
        return [Example(key, (ImageSource(folder / f"{key}.jpg"),), answers=tuple(found)) for key, found in captions.items()]

    return parsed(path, rows)


_COCO_TRAIN = ("train", "restval")
_METRIC = "CIDEr-D x 100"

COCO_CAPTION = Task(
    name="coco_caption",
    title="COCO captions (Karpathy test)",
    kind="caption",
    metric=_METRIC,
    score=caption_scores,
    evaluated=Split((_KARPATHY,), lambda folder: karpathy(folder / _KARPATHY, folder, splits=("test",))),
    demonstrations=Split((_KARPATHY,), lambda folder: karpathy(folder / _KARPATHY, folder, splits=_COCO_TRAIN)),
    published_at="dataset_coco.json of Karpathy's caption_datasets.zip; images of cocodataset.org: train2014.zip, val2014.zip",
    max_new_tokens=30,
    prompt="caption",
    images=("train2014", "val2014"),
)
NOCAPS = Task(
    name="nocaps",
    title="NoCaps (validation)",
    kind="caption",
    metric=_METRIC,
    score=caption_scores,
    evaluated=annotated("nocaps_val_4500_captions.json", coco_style, "images"),
    # NoCaps has no training split: its authors train on COCO's captions.
    demonstrations=Split(
        (f"../coco_caption/{_KARPATHY}",),
        lambda folder: karpathy(folder.parent / "coco_caption" / _KARPATHY, folder.parent / "coco_caption", splits=_COCO_TRAIN),
    ),
    published_at="nocaps.org: nocaps_val_4500_captions.json and the validation images of Open Images; demonstrations are COCO's",
    max_new_tokens=30,
    prompt="caption",
    images=("images",),
)
TEXTCAPS = Task(
    name="textcaps",
    title="TextCaps (validation)",
    kind="caption",
    metric=_METRIC,
    score=caption_scores,
    evaluated=annotated("TextCaps_0.1_val.json", textcaps, "train_images"),
    demonstrations=annotated("TextCaps_0.1_train.json", textcaps, "train_images"),
    published_at="textvqa.org/textcaps: TextCaps_0.1_{train,val}.json and train_val_images.zip",
    max_new_tokens=30,
    prompt="caption",
    images=("train_images",),
)
TASKS = (COCO_CAPTION, NOCAPS, TEXTCAPS)
