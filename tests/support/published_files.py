"""The files of every benchmark in its publisher's format, with two or three examples each; images are small squares of one colour."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = ("red", "green", "blue", "yellow")


def picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 18), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def _image(path: Path, colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(colour))


def _json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_all(data: Path) -> None:
    """Write a folder for each task except those of drawn scenes."""
    _captions(data)
    _questions(data)
    _choices(data)
    _text(data)


def _captions(data: Path) -> None:
    rows = []
    for number, (split, colour) in enumerate(zip(("train", "restval", "train", "test", "test"), (*COLOURS, "red"), strict=True)):
        folder = "val2014" if split == "test" else "train2014"
        sentences = [{"raw": f"a {colour} square {n}."} for n in range(2)]
        rows.append({"cocoid": number, "filepath": folder, "filename": f"{number}.jpg", "split": split, "sentences": sentences})
        _image(data / "coco_caption" / folder / f"{number}.jpg", colour)
    _json(data / "coco_caption" / "dataset_coco.json", {"images": rows})
    images = [{"id": n, "file_name": f"{n}.jpg", "domain": ("in-domain", "out-domain")[n]} for n in range(2)]
    annotations = [{"image_id": n % 2, "caption": f"a square {n}"} for n in range(4)]
    _json(data / "nocaps" / "nocaps_val_4500_captions.json", {"images": images, "annotations": annotations})
    for split in ("train", "val"):
        found = [{"image_id": f"{split}{n // 2}", "caption_str": f"a sign {n}"} for n in range(4)]
        _json(data / "textcaps" / f"TextCaps_0.1_{split}.json", {"data": found})
        for n in range(2):
            _image(data / "nocaps" / "images" / f"{n}.jpg")
            _image(data / "textcaps" / "train_images" / f"{split}{n}.jpg")


def _questions(data: Path) -> None:
    answers = [{"answer": "red"}] * 7 + [{"answer": "Red!"}] * 2 + [{"answer": "blue"}]
    for task, prefix in (("vqav2", "v2_"), ("okvqa", "")):
        for split in ("train", "val"):
            ids = range(3)
            questions = [{"question_id": n, "image_id": n, "question": f"What colour is square {n}?"} for n in ids]
            _json(data / task / f"{prefix}OpenEnded_mscoco_{split}2014_questions.json", {"questions": questions})
            annotations = [{"question_id": n, "image_id": n, "answers": answers} for n in ids]
            _json(data / task / f"{prefix}mscoco_{split}2014_annotations.json", {"annotations": annotations})
            for n in ids:
                _image(data / task / f"{split}2014" / f"COCO_{split}2014_{n:012d}.jpg")
    for split in ("train", "val"):
        rows = [{"question_id": n, "image_id": f"{split}{n}", "question": "What does it say?", "answers": ["stop"] * 10} for n in range(2)]
        _json(data / "textvqa" / f"TextVQA_0.5.1_{split}.json", {"data": rows})
        blind = [{"image": f"{split}_{n}.jpg", "question": "What is it?", "answers": answers} for n in range(2)]
        _json(data / "vizwiz" / f"{split}.json", blind)
        for n in range(2):
            _image(data / "textvqa" / "train_images" / f"{split}{n}.jpg")
            _image(data / "vizwiz" / split / f"{split}_{n}.jpg")
    for name in ("train", "testdev"):
        _json(
            data / "gqa" / f"{name}_balanced_questions.json",
            {f"{name}{n}": {"imageId": "1", "question": "Is it red?", "answer": "yes"} for n in range(2)},
        )
    _image(data / "gqa" / "images" / "1.jpg")


def _choices(data: Path) -> None:
    problems = {
        str(n): {
            "question": "Which?",
            "choices": ["cat", "dog"],
            "answer": n % 2,
            "hint": "Look.",
            "image": "image.png" if n else None,
            "subject": "biology",
        }
        for n in range(4)
    }
    _json(data / "scienceqa" / "problems.json", problems)
    _json(data / "scienceqa" / "pid_splits.json", {"train": ["3"], "test": ["0", "1", "2"]})
    for n, split in ((1, "test"), (2, "test"), (3, "train")):
        _image(data / "scienceqa" / "images" / split / str(n) / "image.png")
    _mmmu(data / "mmmu")
    seed = {"question_id": "7", "data_id": "one", "question": "Which?", "answer": "B", "question_type_id": 1, "data_type": "image"}
    seed |= {f"choice_{letter}": letter for letter in "abcd"}
    _json(
        data / "seed" / "SEED-Bench.json",
        {"questions": [seed, {**seed, "data_type": "video"}], "question_type": {"Scene Understanding": 1}},
    )
    _image(data / "seed" / "SEED-Bench-image" / "one")
    encoded = base64.b64encode(picture("red")).decode()
    rows = [("5", encoded, "cat", "dog", "A"), ("1000005", "5", "dog", "cat", "B")]
    lines = ["index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage"]
    lines += [f"{index}\tWhich?\t\t{a}\t{b}\t\t\t{answer}\tanimals\t{image}" for index, image, a, b, answer in rows]
    (data / "mmbench").mkdir()
    (data / "mmbench" / "MMBench_DEV_EN.tsv").write_text("\n".join(lines) + "\n")
    _image(data / "pope" / "val2014" / "1.jpg")
    for sampling in ("random", "popular", "adversarial"):
        asked = [{"question_id": n, "image": "1.jpg", "text": "Is there a dog?", "label": ("yes", "no")[n]} for n in range(2)]
        (data / "pope" / f"coco_pope_{sampling}.json").write_text("\n".join(map(json.dumps, asked)))
    for category in ("count", "code_reasoning"):
        _image(data / "mme" / category / "1.jpg")
        (data / "mme" / category / "1.txt").write_text(
            "Are there two? Please answer yes or no.\tYes\nAre there three? Please answer yes or no.\tNo\n"
        )


def _mmmu(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    for split in ("dev", "validation"):
        row = {
            "id": f"{split}_Art_1",
            "question": "<image 1> Which?",
            "options": "['cat', 'dog']",
            "answer": "B",
            "question_type": "multiple-choice",
        }
        image = {"bytes": picture("red"), "path": "1.jpg"}
        free = {**row, "id": f"{split}_Art_2", "options": "[]", "answer": "['24/7', '3.429']", "question_type": "open"}
        rows = [{**row, "image_1": image, "image_2": None}, {**free, "image_1": image, "image_2": image}]
        (folder / "Art").mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "Art" / f"{split}-00000-of-00001.parquet")


def _text(data: Path) -> None:
    arc = {"question": "What is wet?", "choices": {"text": ["fire", "water"], "label": ["A", "B"]}, "answerKey": "B"}
    rows: dict[str, tuple[str, dict[str, Any]]] = {
        "arc_easy": ("test", arc),
        "arc_challenge": ("test", arc),
        "piqa": ("validation", {"goal": "open it", "sol1": "push", "sol2": "pull", "label": 0}),
        "lambada": ("test", {"text": "the sky is blue"}),
        "winogrande": ("validation", {"sentence": "Ann hit Bob so _ cried.", "option1": "Ann", "option2": "Bob", "answer": "2"}),
        "hellaswag": ("validation", {"ctx": "A man", "endings": ["runs.", "is a fish.", "x", "y"], "label": "0"}),
        "sciq": (
            "test",
            {"question": "Q?", "distractor1": "a", "distractor2": "b", "distractor3": "c", "correct_answer": "d", "support": ""},
        ),
        "triviaqa": ("validation", {"question": "Q?", "answer": {"value": "Paris", "aliases": ["City of Light"]}}),
        "webqs": ("test", {"question": "Q?", "answers": ["one", "two"]}),
    }
    for name, (split, row) in rows.items():
        (data / name).mkdir()
        for part in (split, "train"):
            (data / name / f"{part}.jsonl").write_text((json.dumps(row) + "\n") * 2)
