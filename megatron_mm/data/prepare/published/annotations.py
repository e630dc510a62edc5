"""Question, answer and caption files, joined into records of tasks: {"task", "question", "answer", "image"}.

    vqav2, okvqa   questions {questions: [{question_id, image_id, question}]}, annotations {annotations: [{question_id,
                   multiple_choice_answer, answers: [{answer}]}]}; images COCO_SUBSET_000000000000.jpg with SUBSET their `data_subtype`,
                   or IMAGE_ID.jpg if `image_id` is a text. TextVQA and VizWiz are also published in this form (textvqa and vizwiz with
                   a file of answers)
    textvqa        {data: [{image_id, question, answers: [...]}]}; images IMAGE_ID.jpg
    textcaps       {data: [{image_id, caption_str}]}, one entry per caption, or one entry per image with a list `reference_strs`; images
                   IMAGE_ID.jpg
    gqa            {id: {imageId, question, answer}}; images IMAGE_ID.jpg
    vizwiz         [{image, question, answers: [{answer}]}]
    aokvqa         [{image_id, question, direct_answers: [...]}]; images 000000000000.jpg, COCO's names since 2017
    docvqa         {data: [{image, question, answers: [...]}]}; InfographicVQA calls the image `image_local_name`
    ocrvqa         {id: {questions: [...], answers: [...], split: 1, 2 or 3}}; images ID with any extension, of one split or all
    chartqa        [{imgname, query, label}]
    coco           {images: [{id, file_name}], annotations: [{image_id, caption}]}
    karpathy       {images: [{filepath, filename, split, sentences: [{raw}]}]}; images FILEPATH/FILENAME, of one split or all
    scienceqa      {id: {question, choices, answer, hint, image, split}}; images SPLIT/ID/IMAGE

If several people have answered a question, the most frequent answer is used (the first one, if several are equally frequent). Records are
sorted by their images, so that samples with the same image are adjacent and share its bytes.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from megatron_mm.data.image_formats import is_image_name
from megatron_mm.data.prepare.published.json_files import load_json
from megatron_mm.data.prepare.published.losses import ORIGIN, BadRecord, Record
from megatron_mm.data.prepare.published.tables import rows_in

logger = logging.getLogger(__name__)

Records = Iterator[Record | BadRecord]
_MALFORMED = "malformed entry"


def read_annotations(
    form: str, questions: str, *, annotations: str | None = None, split: str | None = None, as_captions: bool = False
) -> list[Record | BadRecord]:
    """Return the records of one or two files in the given form, sorted by image.

    Raises ValueError if a file is not in that form, or if an argument does not suit it.

    Args:
        form: key of `FORMS`.
        annotations: file of answers, for forms that have one.
        split: split or splits to read ("train,restval"), for forms whose file contains several; None for all.
        as_captions: the records will be written as image-caption pairs, so forms with questions are refused.
    """
    if form not in FORMS:
        raise ValueError(f"format {form!r} is unknown: use one of {', '.join(FORMS)}")
    if form in TWO_FILES and annotations is None:
        raise ValueError(f"format {form} needs --annotations")
    if annotations is not None and form not in (*TWO_FILES, *ALSO_TWO_FILES):
        raise ValueError(f"format {form} has no --annotations")
    if split is not None and form not in WITH_SPLITS:
        raise ValueError(f"format {form} takes no --split: each of its files holds one split")
    if as_captions and form not in CAPTIONS:
        raise ValueError(f"format {form} has questions, which --as pairs would lose: only {' and '.join(CAPTIONS)} can be pairs")
    main = load_json(questions)
    try:
        if annotations is not None:
            task = "vizwiz" if form == "vizwiz" else "vqa"
            records = list(_vqa(main, load_json(annotations), task=task, files=(questions, annotations)))
        elif form in WITH_SPLITS:
            records = list(FORMS[form](main, split))
        else:
            records = list(FORMS[form](main))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{questions} is not a file in the format {form} ({error!r})") from None
    if records and all(isinstance(record, BadRecord) and record.reason == _MALFORMED for record in records):
        (first,) = (record.what for record in records[:1] if isinstance(record, BadRecord))
        raise ValueError(f"{questions} is not a file in the format {form}: no entry is in that format, for example {first} ...")
    return sorted(records, key=lambda record: str(record.get("image") or "") if isinstance(record, dict) else "")


def _each(entries: Iterable[Any], records_of: Callable[[Any], Records]) -> Records:
    """Yield the records of every entry, with its number. A malformed entry is lost by itself, without the rest of the file."""
    for number, entry in enumerate(entries, start=1):
        named = {"question_id": entry["question_id"]} if isinstance(entry, dict) and "question_id" in entry else {}
        try:
            for record in records_of(entry):
                if isinstance(record, BadRecord):
                    yield replace(record, number=number)
                else:
                    yield {**record, ORIGIN: {"record": number, **named}}
        except (KeyError, TypeError, AttributeError, IndexError, ValueError):
            yield BadRecord(_MALFORMED, what=str(entry)[:120], number=number)


def _vqa(questions: Any, annotations: Any, *, task: str, files: tuple[str, str]) -> Records:
    """Join questions and answers.

    Args:
        files: names of the two files, for messages.
    """
    subset = annotations.get("data_subtype", questions.get("data_subtype", ""))
    answers = {entry["question_id"]: entry for entry in annotations["annotations"]}
    numbers = {entry["question_id"]: number for number, entry in enumerate(annotations["annotations"], start=1)}
    first = next((entry for entry in questions["questions"] if isinstance(entry, dict)), {})
    if not subset and isinstance(first.get("image_id"), int) and not first.get("image"):
        logger.info(
            "neither %s nor %s has a data_subtype (such as train2014), so image 9 is looked up as 9.jpg and not as "
            "COCO_train2014_000000000009.jpg: if images are not found, add that field",
            *files,
        )

    def record(entry: Any) -> Records:
        found = answers.pop(entry["question_id"], None)
        if found is None:
            yield BadRecord("question without answer", what=f"question_id {entry['question_id']}")
            return
        answer = _chosen(found.get("multiple_choice_answer"), [a["answer"] for a in found.get("answers") or []])
        yield {"task": task, "question": entry["question"], "answer": answer, "image": entry.get("image") or _vqa_image(entry, subset)}

    yield from _each(questions["questions"], record)
    for name in answers:
        yield BadRecord("answer without question", what=f"question_id {name}", number=numbers[name], file=files[1])


def _vqa_image(entry: Record, subset: str) -> str:
    """Return the name of a question's image. COCO's images are numbered; those of other data sets in this form have names."""
    number = entry["image_id"]
    if isinstance(number, int) and subset:
        return f"COCO_{subset}_{number:012d}.jpg"
    name = str(number)
    return name if is_image_name(name.rpartition(".")[2].lower()) else f"{name}.jpg"


def _textvqa(data: Any) -> Records:
    def record(entry: Any) -> Records:
        if not entry.get("answers"):
            yield BadRecord("question without answer", what=f"image_id {entry.get('image_id')}")
        else:
            yield {"task": "vqa", "question": entry["question"], "answer": _usual(entry["answers"]), "image": f"{entry['image_id']}.jpg"}

    yield from _each(data["data"], record)


def _textcaps(data: Any) -> Records:
    def record(entry: Any) -> Records:
        captions = _captions_of(entry)
        if not captions:
            yield BadRecord("image without caption", what=f"image_id {entry.get('image_id')}")
        for caption in captions:
            yield {"task": "caption", "answer": caption, "image": f"{entry['image_id']}.jpg"}

    yield from _each(data["data"], record)


def _captions_of(entry: Record) -> list[Any]:
    """Return the captions of an entry or a row. TextCaps repeats all captions of an image (`reference_strs`) next to each single one
    (`caption_str`), so `caption_str` comes first; otherwise each caption would be used five times."""
    if isinstance(entry.get("caption_str"), str):
        return [entry["caption_str"]]
    found: Any = next((entry[name] for name in _CAPTION_FIELDS if entry.get(name)), [])
    return found if isinstance(found, list) else [found]


_CAPTION_FIELDS = ("reference_strs", "captions", "caption", "sentences", "answer")


def _gqa(data: Any) -> Records:
    def record(entry: Any) -> Records:
        yield {"task": "vqa", "question": entry["question"], "answer": entry.get("answer"), "image": f"{entry['imageId']}.jpg"}

    yield from _each(data.values(), record)


def _vizwiz(data: Any) -> Records:
    def record(entry: Any) -> Records:
        if not entry.get("answers"):
            yield BadRecord("question without answer", what=str(entry.get("image")))
        else:
            answer = _usual([a["answer"] for a in entry["answers"]])
            yield {"task": "vizwiz", "question": entry["question"], "answer": answer, "image": entry["image"]}

    yield from _each(data, record)


def _aokvqa(data: Any) -> Records:
    def record(entry: Any) -> Records:
        if not entry.get("direct_answers"):  # the test set
            yield BadRecord("question without answer", what=f"question_id {entry.get('question_id')}")
        else:
            image = entry.get("image") or f"{entry['image_id']:012d}.jpg"
            yield {"task": "vqa", "question": entry["question"], "answer": _usual(entry["direct_answers"]), "image": image}

    yield from _each(data, record)


def _docvqa(data: Any) -> Records:
    def record(entry: Any) -> Records:
        image = entry["image"] if "image" in entry else entry["image_local_name"]
        if not entry.get("answers"):
            yield BadRecord("question without answer", what=str(image))
        else:
            yield {"task": "vqa", "question": entry["question"], "answer": _usual(entry["answers"]), "image": image}

    yield from _each(data["data"], record)


_OCRVQA_SPLITS = {1: "train", 2: "val", 3: "test"}


def _ocrvqa(data: Any, split: str | None) -> Records:
    _check_split(split, [{"split": _OCRVQA_SPLITS.get(entry.get("split"), "")} for entry in data.values()])

    def record(book: tuple[str, Any]) -> Records:
        image, entry = book
        if _is_of(split, _OCRVQA_SPLITS.get(entry["split"])):
            for question, answer in zip(entry["questions"], entry["answers"], strict=True):
                yield {"task": "vqa", "question": question, "answer": answer, "image": image}

    yield from _each(data.items(), record)


def _chartqa(data: Any) -> Records:
    def record(entry: Any) -> Records:
        yield {"task": "vqa", "question": entry["query"], "answer": entry["label"], "image": entry["imgname"]}

    yield from _each(data, record)


def _coco(data: Any) -> Records:
    files = {entry["id"]: entry["file_name"] for entry in data["images"]}
    with_captions = set()

    def record(entry: Any) -> Records:
        if entry["image_id"] not in files:
            yield BadRecord("caption of an unlisted image", what=f"image_id {entry['image_id']}")
            return
        with_captions.add(entry["image_id"])
        yield {"task": "caption", "answer": entry["caption"], "image": files[entry["image_id"]]}

    yield from _each(data["annotations"], record)
    for place, number in enumerate(files, start=1):
        if number not in with_captions:
            yield BadRecord("image without caption", what=files[number], number=place)


def _karpathy(data: Any, split: str | None) -> Records:
    _check_split(split, data["images"])

    def record(entry: Any) -> Records:
        if not _is_of(split, entry["split"]):
            return
        image = "/".join(filter(None, (entry.get("filepath"), entry["filename"])))
        if not entry["sentences"]:
            yield BadRecord("image without caption", what=image)
        for sentence in entry["sentences"]:
            yield {"task": "caption", "answer": sentence["raw"], "image": image}

    yield from _each(data["images"], record)


def _check_split(split: str | None, entries: Iterable[Any]) -> None:
    """Raise ValueError if a split is given but no entry belongs to it."""
    splits = sorted({str(entry.get("split", "")) for entry in entries if isinstance(entry, dict)})
    for name in split.split(",") if split is not None else ():
        if name not in splits:
            raise ValueError(f"no entry is in the split {name!r}: the splits are {', '.join(splits)}")


def _is_of(split: str | None, name: object) -> bool:
    """Return whether a split was chosen; None chooses all, and a comma separates several."""
    return split is None or name in split.split(",")


def _scienceqa(data: Any, split: str | None) -> Records:
    _check_split(split, data.values())

    def record(problem: tuple[str, Any]) -> Records:
        number, entry = problem
        if _is_of(split, entry.get("split")):
            image = f"{entry.get('split', '')}/{number}/{entry['image']}" if entry.get("image") else None
            yield scienceqa_record({**entry, "image": image})

    yield from _each(data.items(), record)


def scienceqa_record(entry: Record) -> Record:
    """Return the task of a ScienceQA entry, from JSON or from a row of a parquet file."""
    names = ("question", "choices", "answer", "image")
    return {"task": "scienceqa", "context": entry.get("hint") or None, **{name: entry.get(name) for name in names}}


def row_records(form: str, row: Record) -> Records:
    """Yield the tasks of a row of a parquet or arrow file, in which republished data sets combine question, answers and image."""
    if form == "scienceqa":
        yield scienceqa_record(row)
        return
    image = row.get("image")
    if form in CAPTIONS:
        captions = _captions_of(row)
        for caption in captions:
            yield {"task": "caption", "answer": caption, "image": image}
        if not captions:
            yield BadRecord("image without caption")
        return
    answers: list[Any] = next((found for name in _ANSWER_LISTS if isinstance(found := rows_in(row.get(name)), list)), [])
    if isinstance(questions := row.get("questions"), list):  # OCR-VQA
        for question, said in zip(questions, answers, strict=False):
            yield {"task": "vqa", "question": question, "answer": said, "image": image}
        return
    spoken = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers if answer is not None]
    answer = (
        _chosen(row.get("multiple_choice_answer"), spoken) if row.get("multiple_choice_answer") else row.get("answer") or _usual(spoken)
    )
    question = row.get("question") or row.get("query")
    yield {"task": "vizwiz" if form == "vizwiz" else "vqa", "question": question, "answer": answer, "image": image}


_ANSWER_LISTS = ("answers", "direct_answers", "label")
"""Columns with the answers of several people, or to several questions."""


def of_split(records: Iterable[Record | BadRecord], split: str, path: str, left_out: Counter[str]) -> Records:
    """Yield the rows whose column `split` has one of these values; count the others. Raises ValueError if there is no such column."""
    for record in records:
        if isinstance(record, BadRecord) or _is_of(split, record.get("split")):
            yield record
        elif record.get("split") is None:
            raise ValueError(f"{path} has no column `split`, so --split does not apply: pass only the files of the split")
        else:
            left_out[f"of the split {record['split']}"] += 1


def as_pair(record: Record | BadRecord) -> Record | BadRecord:
    """Convert a caption task to a pair."""
    if isinstance(record, BadRecord):
        return record
    origin = {ORIGIN: record[ORIGIN]} if ORIGIN in record else {}
    return {"image": record.get("image"), "caption": record.get("answer"), **origin}


def _chosen(named: Any, answers: list[Any]) -> Any:
    """Return the most frequent answer. VQAv2 names it (`multiple_choice_answer`), which decides between equally frequent ones; but some
    files converted to its form name the first answer instead, so a less frequent one is not taken."""
    counts = Counter(answers)
    return named if named and (named not in counts or counts[named] == max(counts.values())) else _usual(answers)


def _usual(answers: list[Any]) -> Any:
    return Counter(answers).most_common(1)[0][0] if answers else None


FORMS: dict[str, Callable[..., Records]] = {
    "vqav2": _vqa,
    "okvqa": _vqa,
    "textvqa": _textvqa,
    "textcaps": _textcaps,
    "gqa": _gqa,
    "vizwiz": _vizwiz,
    "aokvqa": _aokvqa,
    "docvqa": _docvqa,
    "ocrvqa": _ocrvqa,
    "chartqa": _chartqa,
    "coco": _coco,
    "karpathy": _karpathy,
    "scienceqa": _scienceqa,
}
WITH_SPLITS = ("ocrvqa", "karpathy", "scienceqa")
"""Forms whose file contains several splits."""
CAPTIONS = ("textcaps", "coco", "karpathy")
"""Forms that have captions and no questions."""
TWO_FILES = ("vqav2", "okvqa")
"""Forms with a file of questions and one of answers."""
ALSO_TWO_FILES = ("textvqa", "vizwiz")
"""Forms of one file that are also published in two, like VQAv2."""
