"""Published files that are damaged or odd: what can be used is used, and every loss is counted and named."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from support.published_runs import run, write_images

from megatron_mm.data.prepare.published import json_files, tables
from megatron_mm.data.prepare.published import records as published_records
from megatron_mm.data.prepare.published.losses import BadRecord, DamagedFile
from megatron_mm.data.prepare.published.records import iterate_records


def table_with_a_bad_text(rows: int, *, bad: int) -> pyarrow.Table:
    """Return a table with one string that is not UTF-8, and a column of times that Python's datetime cannot represent."""
    values = pyarrow.array([b"a red circle" if row != bad else b"\xc3\x28" for row in range(rows)], pyarrow.binary())
    times = pyarrow.array([10**18 + 1] * rows, pyarrow.timestamp("ns"))
    return pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), rows, values.buffers()), "when": times, "id": range(rows)})


@pytest.mark.parametrize("ending", ["parquet", "PARQUET", "arrow"])
def test_one_bad_text_of_a_table_costs_its_row(tmp_path: Path, ending: str) -> None:
    table, path = table_with_a_bad_text(300, bad=150), tmp_path / f"a.{ending}"
    if ending == "arrow":
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    else:
        pyarrow.parquet.write_table(table, path)
    found = run("text", [path], tmp_path / "out", lose=0.05)
    assert (found.samples, found.rejected) == (299, {"text is not UTF-8": 1})
    assert found.examples == [f"text is not UTF-8: {path}, record 151 (id 150)"]


def test_lost_records_and_images_are_listed(tmp_path: Path) -> None:
    """A file lists all of them; the summary lists the first three of each reason."""
    images = write_images(tmp_path / "images", ["0.jpg"])
    lines = [{"texts": ["a", None, None], "images": [None, f"{number}.jpg", "0.jpg"], "id": number} for number in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join([*map(json.dumps, lines), "{", '{"texts": 3, "url": "http://x/9"}']))
    found = run("obelics", [tmp_path / "a.jsonl"], tmp_path / "out", images=str(images), lose=0.9)
    assert found.rejected == {"malformed JSON": 1, "malformed texts list": 1} and found.dropped == {"image not found": 4}
    listed = [json.loads(line) for line in (tmp_path / "out" / ".prepared" / "00000.rejected.jsonl").read_text().splitlines()]
    assert [line["record"] for line in listed] == [2, 3, 4, 5, 6, 7]
    assert listed[0] == {"record": 2, "reason": "image not found", "what": "1.jpg", "id": "1"}
    assert listed[-1] == {"record": 7, "reason": "malformed texts list", "url": "http://x/9"}
    assert sum("image not found" in line for line in found.named()) == 3 and "record 7 (url http://x/9)" in str(found)
    (tmp_path / "a.jsonl").write_text(json.dumps({"texts": ["a"], "images": [None]}))
    assert run("obelics", [tmp_path / "a.jsonl"], tmp_path / "out", images=str(images)).examples == []
    assert not (tmp_path / "out" / ".prepared" / "00000.rejected.jsonl").exists()


def test_too_many_rejected_names_some(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"txt": "", "id": "first"}\n{"text": "x"}')
    with pytest.raises(ValueError, match=r"no text: 1.*\n  no text: .*a\.jsonl, record 1 \(id first\)"):
        run("text", [tmp_path / "a.jsonl"], tmp_path / "out")


@pytest.mark.parametrize("data", [b"\xef\xbb\xbf" + json.dumps([{"text": "a"}, {"text": "b"}], indent=2).replace("\n", "\r\n").encode()])
def test_a_list_with_a_byte_order_mark(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.json").write_bytes(data)
    assert run("text", [tmp_path / "a.json"], tmp_path / "out").samples == 2


def test_json_that_is_damaged_in_the_middle(tmp_path: Path) -> None:
    """In a JSON list, the records before the damage are used; in JSON lines, all but the damaged lines."""
    (tmp_path / "list.json").write_text(json.dumps([{"text": "a"}, {"text": "b"}, {"text": "c"}])[:-6])
    found = run("text", [tmp_path / "list.json"], tmp_path / "list", lose=1)
    assert found.samples == 2 and "damaged after 2 records" in found.damaged[0]
    (tmp_path / "lines.jsonl").write_text('{"text": "cut\n{"text": "cut, too\n{"text": "a"}\n{"text": "b"}\n')
    found = run("text", [tmp_path / "lines.jsonl"], tmp_path / "lines", lose=1)
    assert found.samples == 2 and found.rejected == {"malformed JSON": 2}
    (tmp_path / "byte.json").write_bytes(b'[{"text": "a"}, {"text": "caf\xe9"}, {"text": "c"}]')
    found = run("text", [tmp_path / "byte.json"], tmp_path / "byte", lose=1)
    assert found.samples == 2 and found.rejected == {"text is not UTF-8": 1}
    for coding, name in (("utf-16", "UTF-16"), ("utf-16-le", "UTF-16"), ("utf-32", "UTF-32"), ("utf-32-le", "UTF-32")):
        for text in ('[{"text": "a"}]', '{"text": "a"}\n', "[1,"):
            (tmp_path / "wide.json").write_bytes(text.encode(coding))
            with pytest.raises(ValueError, match=rf"{name}.*iconv"):
                run("text", [tmp_path / "wide.json"], tmp_path / "wide")


def test_a_list_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the pieces end: in names, numbers, escapes, characters of several bytes, and spaces between records."""
    records = [{"text": f"{'ü' * number}\\n \u20ac", "n": 10**number, "more": {"a": [1, 2.5e3, None]}} for number in range(12)]
    data = json.dumps(records, ensure_ascii=False, indent=1).encode() + b"\n \n"
    (tmp_path / "a.json").write_bytes(data)
    (tmp_path / "numbers.json").write_text('[-1.5e-30,1E+2 , 12.25,0,{"n":1.5}]')
    for piece in (1, 2, 3, 7, 64):
        monkeypatch.setattr(json_files, "_PIECE", piece)
        assert list(iterate_records(str(tmp_path / "a.json"))) == records
        assert list(iterate_records(str(tmp_path / "numbers.json"))) == [BadRecord(json_files.NO_OBJECT)] * 4 + [{"n": 1.5}]
    monkeypatch.setattr(json_files, "MAX_FILE_BYTES", 100)
    with pytest.raises(DamagedFile, match="damaged after 1 records"):  # the second record is longer than that
        (tmp_path / "b.json").write_text(json.dumps([{"text": "a"}, {"text": "b" * 200}]))
        list(iterate_records(str(tmp_path / "b.json")))


@pytest.mark.parametrize(
    ("text", "found", "message"),
    [
        ('[{"text": "a"} {"text": "b"}]', 1, "damaged after 1 records, at character 15"),
        ('[{"text": "a"},]', 1, "damaged after 1 records, at character 15"),
        ('[{"text": "a"}]\n{"text": "b"}', 1, "continues after the end of its list of 1 records, at character 16"),
        ('[{"text": "a"}, 12', 2, "damaged after 2 records"),
        ("[", 0, "it is not JSON, at character 1"),
        ("[" * 5000, 0, "it is not JSON"),
        ('{"text": "a",\n "tags": [1 2]}', 0, "it is not JSON: Expecting ',' delimiter at line 2, column 13"),
        ("[]", 0, None),
    ],
)
def test_what_is_wrong_with_a_list(tmp_path: Path, text: str, found: int, message: str | None) -> None:
    (tmp_path / "a.json").write_text(text)
    records: list[Any] = []
    with pytest.raises(DamagedFile, match=message) if message else contextlib.nullcontext():
        for record in iterate_records(str(tmp_path / "a.json")):
            records.append(record)
    assert len(records) == found


def test_a_key_with_two_values_is_never_lost_silently(tmp_path: Path) -> None:
    twice, once = '{"text": "a", "text": "b"}', '{"text": "c", "text": "c"}'
    (tmp_path / "a.json").write_text(f"[{twice}, {once}]")
    (tmp_path / "b.json").write_text('{\n"text": "a",\n"text": "b"}')
    (tmp_path / "c.jsonl").write_text(f"{twice}\n{once}")
    found = run("text", [tmp_path / name for name in ("a.json", "b.json", "c.jsonl")], tmp_path / "out", lose=1)
    assert found.samples == 2 and found.rejected == {"JSON has a duplicate key": 3}
    images = write_images(tmp_path / "images", ["0.jpg"])
    (images / "0.json").write_text('{"caption": "a", "caption": "b"}')
    with pytest.raises(ValueError, match="JSON has a duplicate key: 1"):
        run("pairs", [images], tmp_path / "pairs")
    (tmp_path / "questions.json").write_text('{"1": {"question": "a"}, "1": {"question": "b"}}')
    with pytest.raises(ValueError, match=r"questions\.json: JSON has a duplicate key with different values: correct it"):
        run("tasks", [tmp_path / "questions.json"], tmp_path / "vqa", form="gqa", images=str(images))


@pytest.mark.parametrize("texts", ["file", "line", "paragraph"])
def test_a_text_of_exactly_the_limit_is_not_longer_than_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: Any) -> None:
    """A longer one is rejected as a whole, not cut in two, and is not kept in memory."""
    for module in (json_files, published_records):
        monkeypatch.setattr(module, "MAX_FILE_BYTES", 8)
    rest = b"" if texts == "file" else b"\n\n12345678"
    for text, good in ((b"12345678", True), (b"123456789", False), (b"1" * 30, False)):
        (tmp_path / "a.txt").write_bytes(text + rest)
        found = list(iterate_records(str(tmp_path / "a.txt"), texts=texts))
        assert isinstance(found[0], dict) == good and found[1:] == ([{"text": "12345678"}] if rest else []), text
        (tmp_path / "a.jsonl").write_bytes(b'{"a":12}' if good else b'{"a":12' + text + b"}")
        assert isinstance(next(iter(iterate_records(str(tmp_path / "a.jsonl")))), dict) == good


def test_rows_of_a_table_that_it_does_not_have_are_counted(tmp_path: Path) -> None:
    """The footer says 300 rows, and the column has 100."""
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 100}), path, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    begin = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    for place in [at for at in range(begin, len(data) - 2) if data[at : at + 2] == b"\xc8\x01"]:  # 100 in the footer, in thrift's form
        data[place : place + 2] = b"\xd8\x04"
    path.write_bytes(data)
    found = list(iterate_records(str(path)))
    lost = sum(record.count for record in found if isinstance(record, BadRecord))
    assert lost and sum(isinstance(record, dict) for record in found) + lost == 300


def test_a_row_that_would_not_fit_into_memory_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 300_000, "b"]}), path, row_group_size=1)
    monkeypatch.setattr(tables, "MAX_FILE_BYTES", 100_000)
    assert list(iterate_records(str(path))) == [BadRecord(tables._LARGE_ROW), {"text": "b"}]


def test_a_column_of_a_type_that_python_lacks_costs_no_row() -> None:
    """pyarrow has no class for intervals of months, so that it raises KeyError for the whole column."""

    class Batch:
        schema, num_rows = pyarrow.schema([("months", pyarrow.int32()), ("text", pyarrow.string())]), 2

        def to_pylist(self) -> list[Any]:
            raise KeyError(21)

        def column(self, place: int) -> Any:
            return pyarrow.array(["a", "b"]) if place else {}[21]

    assert list(tables.rows_of(Batch())) == [{"months": None, "text": "a"}, {"months": None, "text": "b"}]


def test_a_zip_that_python_cannot_unpack_names_the_file_in_it(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.jsonl", '{"text": "a"}\n')
    for offset, value, message in ((6, 1, "a.jsonl in it .*it is encrypted"), (8, 93, "a.jsonl in it .*not supported")):
        data = bytearray(packed.getvalue())
        for place in (data.index(b"PK\3\4") + offset, data.index(b"PK\1\2") + offset + 2):  # flags or compression, in both headers
            data[place] = value
        (tmp_path / "a.jsonl.zip").write_bytes(data)
        with pytest.raises(DamagedFile, match=message):
            list(iterate_records(str(tmp_path / "a.jsonl.zip")))


@pytest.mark.parametrize("name", ["q.json.gz", "q.json.zst", "q.json.xz", "q.json.bz2", "q.json.zip"])
def test_annotations_that_cannot_be_unpacked_are_named(tmp_path: Path, name: str) -> None:
    pack = {"gz": gzip.compress, "zst": zstandard.compress, "xz": lzma.compress, "bz2": bz2.compress, "zip": lambda data: b"PK\3\4" + data}
    data = pack[name.rpartition(".")[2]](b'{"1": {"question": "a"}}' * 40)
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(DamagedFile, match=rf"{name} cannot be read to the end: "):
        json_files.load_json(str(tmp_path / name))
    with pytest.raises(ValueError, match=rf"{name} cannot be read to the end"):
        run("tasks", [tmp_path / name], tmp_path / "out", form="gqa", images=str(tmp_path))


def test_links_are_followed_and_broken_ones_are_counted(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "b.txt").write_text("b")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a")
    (tmp_path / "in" / "far").symlink_to(tmp_path / "far")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "gone.txt").symlink_to(tmp_path / "nowhere")
    found = run("text", [tmp_path / "in"], tmp_path / "out", lose=0.5)
    assert found.samples == 2 and found.rejected == {"damaged input file": 1} and "gone.txt" in found.damaged[0]
    images = write_images(tmp_path / "pictures", ["COCO_1.jpg", "gone.jpg"])
    (images / "COCO_1.txt").write_text("a cross")
    (images / "gone.jpg").unlink()
    (images / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    found = run("pairs", [images], tmp_path / "pairs", lose=0.5)
    assert found.samples == 1 and found.rejected == {"image file cannot be read": 1}
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "train2014").symlink_to(images)
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": "COCO_1.jpg", "caption": "a cross"}))
    assert run("pairs", [tmp_path / "q.jsonl"], tmp_path / "named", images=str(tmp_path / "linked")).samples == 1
