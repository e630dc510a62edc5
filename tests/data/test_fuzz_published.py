"""Records and files of published data sets with arbitrary values in any place: each becomes a sample or has a reason."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.data_files import picture

from megatron_mm.data.prepare.published import json_files
from megatron_mm.data.prepare.published.annotations import FORMS, read_annotations
from megatron_mm.data.prepare.published.images import ImageStore
from megatron_mm.data.prepare.published.layouts import CAPTION_KEYS, IMAGE_KEYS, LAYOUTS, Context, LeftOut
from megatron_mm.data.prepare.published.losses import BadRecord, DamagedFile
from megatron_mm.data.prepare.published.records import iterate_records
from megatron_mm.data.text.items import BadDocument

RECORDS: dict[str, Any] = {
    "pairs": {"image": {"bytes": None, "path": "0.jpg"}, "caption": "a circle", "status": "success"},
    "obelics": {"texts": ["a circle", None], "images": [None, "0.jpg"]},
    "mmc4": {"text_list": ["a", "b"], "image_info": [{"image_name": "0.jpg", "raw_url": "http://x/0.jpg", "matched_text_index": 1}]},
    "llava": {"image": "0.jpg", "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a circle"}]},
    "tasks": {"task": "scienceqa", "question": "which?", "choices": ["a", "b"], "answer": 1, "image": "0.jpg", "context": None},
    "text": {"text": "a circle"},
}
ANSWERS = {"annotations": [{"question_id": 1, "multiple_choice_answer": "red", "answers": [{"answer": "red"}]}], "data_subtype": "val2014"}
QUESTIONS = {"questions": [{"question_id": 1, "image_id": 0, "question": "what?"}]}
FILES: dict[str, Any] = {
    "vqav2": QUESTIONS,
    "okvqa": QUESTIONS,
    "textvqa": {"data": [{"image_id": "0", "question": "what?", "answers": ["red", "blue"]}]},
    "textcaps": {"data": [{"image_id": "0", "reference_strs": ["a circle"]}]},
    "gqa": {"7": {"imageId": "0", "question": "what?", "answer": "red"}},
    "vizwiz": [{"image": "0.jpg", "question": "what?", "answers": [{"answer": "red"}]}],
    "karpathy": {"images": [{"filepath": "", "filename": "0.jpg", "split": "train", "sentences": [{"raw": "a ball"}, {"raw": "red"}]}]},
    "aokvqa": [{"image_id": 7, "question_id": "x", "question": "what?", "direct_answers": ["red", "blue"]}],
    "docvqa": {"data": [{"image": "0.jpg", "question": "what?", "answers": ["red"]}]},
    "ocrvqa": {"0": {"questions": ["what?"], "answers": ["red"], "split": 1}},
    "chartqa": [{"imgname": "0.jpg", "query": "what?", "label": "red"}],
    "coco": {"images": [{"id": 1, "file_name": "0.jpg"}], "annotations": [{"image_id": 1, "caption": "a circle"}]},
    "scienceqa": {"3": {"question": "which?", "choices": ["a"], "answer": 0, "hint": "", "image": "0.jpg", "split": "train"}},
}
ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 3)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["0.jpg", "<image>", "gpt", "vqa"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "image", "bytes", "type", "answer"]), inner, max_size=3)
    ),
    max_leaves=6,
)
CHANGES = st.lists(st.tuples(st.integers(0, 30), ANY), min_size=1, max_size=3)


def inputs(count: int) -> settings:
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return every place in a JSON value as (container, key)."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, child in children for place in ((value, key), *places(child))]


def changed(value: Any, changes: list[tuple[int, Any]]) -> Any:
    """Return a copy with other values in some places."""
    value = copy.deepcopy(value)
    for number, other in changes:
        found = places(value)
        if found:
            inside, key = found[number % len(found)]
            inside[key] = copy.deepcopy(other)
    return value


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("published")
    (found / "0.jpg").write_bytes(picture())
    return found


def check_record(folder: Path, layout: str, changes: list[tuple[int, Any]]) -> None:
    context = Context(images=ImageStore(folder, table=None), text_keys=("text", *CAPTION_KEYS), image_keys=IMAGE_KEYS)
    try:
        sample = LAYOUTS[layout](changed(RECORDS[layout], changes), context)
    except (BadDocument, LeftOut) as reason:
        assert 0 < len(str(reason)) < 120
        return
    assert sample.document and all(data for _, data in sample.images)


def check_file(folder: Path, form: str, changes: list[tuple[int, Any]], other: list[tuple[int, Any]]) -> None:
    (folder / "q.json").write_text(json.dumps(changed(FILES[form], changes)))
    (folder / "a.json").write_text(json.dumps(changed(ANSWERS, other)))
    context = Context(images=ImageStore(folder, table=None), text_keys=CAPTION_KEYS, image_keys=IMAGE_KEYS)
    try:
        records = read_annotations(form, str(folder / "q.json"), annotations=str(folder / "a.json") if form in ("vqav2", "okvqa") else None)
    except ValueError as error:
        assert "q.json" in str(error), error
        return
    for record in records:
        if not isinstance(record, BadRecord):
            try:
                LAYOUTS["tasks"](record, context)
            except BadDocument as reason:
                assert 0 < len(str(reason)) < 120


def check_lines(folder: Path, data: bytes) -> None:
    (folder / "lines.jsonl").write_bytes(b'{"text": "a circle"}\n' + data)
    given_records = 0
    try:
        given_records = sum(1 for _ in iterate_records(str(folder / "lines.jsonl")))
    except DamagedFile:
        return
    assert given_records >= 1


def check_list(values: list[Any], indent: int | None, piece: int, keep: float) -> None:
    """Check that a list read in pieces gives what a parser of the whole gives, and that a list that is cut off says so."""
    data = json.dumps(values, indent=indent, ensure_ascii=False).encode("utf-8", "surrogatepass")
    wanted = [value if isinstance(value, dict) else BadRecord(json_files.NO_OBJECT) for value in json.loads(data)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "_PIECE", piece)
        assert repr(list(json_files.json_records(io.BytesIO(data)))) == repr(wanted)
        found: list[Any] = []
        with pytest.raises(DamagedFile):
            found.extend(json_files.json_records(io.BytesIO(data[: max(1, int(keep * (len(data) - 1)))])))
        assert len(found) <= len(wanted)


@given(st.lists(ANY, max_size=6), st.sampled_from([None, 0, 2]), st.integers(1, 40), st.floats(0, 1))
@inputs(80)
def test_any_list_in_pieces_is_the_same_list(values: list[Any], indent: int | None, piece: int, keep: float) -> None:
    check_list(values, indent, piece, keep)


@given(st.sampled_from(sorted(RECORDS)), CHANGES)
@inputs(150)
def test_any_record_is_a_sample_or_has_a_reason(folder: Path, layout: str, changes: list[tuple[int, Any]]) -> None:
    check_record(folder, layout, changes)


@given(st.sampled_from(sorted(FORMS)), CHANGES, CHANGES)
@inputs(80)
def test_any_annotations_are_records_or_no_file_of_the_form(
    folder: Path, form: str, changes: list[tuple[int, Any]], other: list[tuple[int, Any]]
) -> None:
    check_file(folder, form, changes, other)


@given(
    st.lists(st.binary(max_size=20) | st.sampled_from([b"{", b"[", b'{"text": "x"}', b"\n", b"\0", b"\xff", b"]"]), max_size=8).map(
        b"".join
    )
)
@inputs(80)
def test_any_lines_are_records_or_damage(folder: Path, data: bytes) -> None:
    check_lines(folder, data)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@given(st.sampled_from(sorted(RECORDS)), CHANGES)
@inputs(10_000)
def test_ten_thousand_records(folder: Path, layout: str, changes: list[tuple[int, Any]]) -> None:
    check_record(folder, layout, changes)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@given(st.lists(ANY, max_size=6), st.sampled_from([None, 0, 2]), st.integers(1, 40), st.floats(0, 1))
@inputs(10_000)
def test_ten_thousand_lists_in_pieces(values: list[Any], indent: int | None, piece: int, keep: float) -> None:
    check_list(values, indent, piece, keep)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@given(st.sampled_from(sorted(FORMS)), CHANGES, CHANGES)
@inputs(5_000)
def test_thousands_of_annotation_files(folder: Path, form: str, changes: list[tuple[int, Any]], other: list[tuple[int, Any]]) -> None:
    check_file(folder, form, changes, other)
