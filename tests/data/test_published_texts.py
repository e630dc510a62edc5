"""Texts in every published file format; the command line, and a repeated command."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from support.published_runs import indexed, run, write_images

from megatron_mm.cli import main as cli
from megatron_mm.data.prepare.published.convert import Options, convert
from megatron_mm.data.prepare.published.losses import DamagedFile
from megatron_mm.data.prepare.published.records import iterate_records
from megatron_mm.data.sources.shards import iterate_jsonl


def text_files(folder: Path, texts: list[str]) -> list[Path]:
    """Write the same texts in every supported format."""
    lines = "".join(json.dumps({"text": text, "meta": {"n": 1}}) + "\n" for text in texts).encode()
    table = pyarrow.table({"text": texts})
    frames = b"".join(zstandard.compress(line + b"\n") for line in lines.splitlines())  # several frames, as written by parallel writers
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.jsonl", lines)
    streamed, whole = io.BytesIO(), io.BytesIO()
    with pyarrow.ipc.new_stream(streamed, table.schema) as stream:
        stream.write_table(table)
    with pyarrow.ipc.new_file(whole, table.schema) as file:
        file.write_table(table)
    members = gzip.compress(lines.splitlines(keepends=True)[0]) + gzip.compress(b"".join(lines.splitlines(keepends=True)[1:]))
    contents = {
        "a.jsonl": lines,
        "c4-train.00000-of-01024.json.gz": members,
        "a.jsonl.zst": frames,
        "a.jsonl.zip": packed.getvalue(),
        "list.json": json.dumps([{"text": text} for text in texts], indent=1).encode(),
        "stream.arrow": streamed.getvalue(),
        "file.arrow": whole.getvalue(),
        "a.txt": "\n\n".join(texts).encode(),
    }
    folder.mkdir()
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=1)
    return sorted(folder.iterdir())


def test_texts_of_every_format_are_the_same(tmp_path: Path, demo_data: Path) -> None:
    texts = ["a red circle", "ünïcödé", "three"]
    files = text_files(tmp_path / "in", texts)
    found = run("text", files, tmp_path / "out", texts="paragraph")
    assert found.samples == len(texts) * len(files) and found.rejected == {} and len(found.shards) == len(files)
    for shard in found.shards:
        assert [json.loads(line.data)["text"] for line in iterate_jsonl(tmp_path / "out" / shard)] == texts
    index = indexed(tmp_path / "out", demo_data)
    assert index.kind == "text" and len(index) == found.samples


@pytest.mark.parametrize(
    "name", ["a.jsonl.zst", "c4-train.00000-of-01024.json.gz", "a.jsonl.zip", "a.parquet", "stream.arrow", "list.json"]
)
def test_a_file_that_is_cut_off_is_no_shorter_file(tmp_path: Path, name: str) -> None:
    texts = [f"text {n} " + "x" * n for n in range(50)]
    text_files(tmp_path / "in", texts)
    path = tmp_path / "in" / name
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DamagedFile):
        list(iterate_records(str(path)))
    with pytest.raises(
        ValueError, match=r"1 of 1 inputs are damaged, more than .*\. The shards are in|damaged input file: 1; .*\. The shards are in"
    ):
        run("text", [path], tmp_path / "out", lose=0.5)


def test_the_field_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"raw": {"content": "deep"}}) + "\n")
    with pytest.raises(ValueError, match=r"1 of 1 records \(100.0%\) are rejected.*no text: 1"):
        run("text", [tmp_path / "a.jsonl"], tmp_path / "out")
    assert run("text", [tmp_path / "a.jsonl"], tmp_path / "out", text_keys=("raw.content",)).samples == 1


def test_archives_are_known_by_their_first_bytes(tmp_path: Path) -> None:
    lines = b'{"text": "a red circle"}\n'
    (tmp_path / "plain.jsonl.gz").write_bytes(lines)
    (tmp_path / "packed.jsonl").write_bytes(gzip.compress(lines))
    with zipfile.ZipFile(tmp_path / "mac.jsonl.zip", "w") as archive:
        archive.writestr("mac.jsonl", lines)
        archive.writestr("__MACOSX/._mac.jsonl", b"\0\5\26\7")
    found = run("text", [tmp_path / name for name in ("plain.jsonl.gz", "packed.jsonl", "mac.jsonl.zip")], tmp_path / "out")
    assert (found.samples, found.rejected) == (3, {})
    (tmp_path / "empty.jsonl.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="it is empty"):
        run("text", [tmp_path / "empty.jsonl.gz"], tmp_path / "out2")


def test_zstd_with_a_long_window(tmp_path: Path) -> None:
    """Similar to the output of `zstd --long=31`."""
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(packer.compress(b'{"text": "a"}\n') + packer.flush())
    assert run("text", [tmp_path / "a.jsonl.zst"], tmp_path / "out").samples == 1


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    """In a folder of `save_to_disk`, metadata files are not records, and cached results of `map` are not read."""
    folder = tmp_path / "saved" / "train"
    folder.mkdir(parents=True)
    table = pyarrow.table({"text": ["a", "b"]})
    for name in ("data-00000-of-00001.arrow", "cache-0123456789abcdef.arrow"):
        with pyarrow.OSFile(str(folder / name), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    for note in ("state.json", "dataset_info.json", "../dataset_dict.json"):
        (folder / note).write_text(json.dumps({"text": "about it"}))
    assert run("text", [tmp_path / "saved"], tmp_path / "out").samples == 2


def test_inputs_that_are_done_are_not_done_again(tmp_path: Path) -> None:
    files = []
    for n in range(3):
        files.append(tmp_path / f"{n}.jsonl")
        files[n].write_text(json.dumps({"text": f"text {n}"}) + "\n" + json.dumps({"text": "x" * 200}) + "\n")
    first = run("text", files, tmp_path / "out", shard_bytes=100)
    assert len(first.shards) == 3
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.jsonl")}
    files[1].write_text(json.dumps({"text": "another, that is longer"}))
    (tmp_path / "out" / "00002-00000.jsonl").unlink()  # as if it had been stopped
    again = run("text", files, tmp_path / "out", shard_bytes=100)
    changed = sorted(path.name for path in (tmp_path / "out").glob("*.jsonl") if times.get(path) != path.stat().st_mtime_ns)
    assert changed == ["00001-00000.jsonl", "00002-00000.jsonl"] and again.samples == 5
    assert not list((tmp_path / "out").glob(".*.partial"))


def test_losses_of_an_earlier_version_are_looked_at_again(tmp_path: Path) -> None:
    (tmp_path / "0.jsonl").write_text('{"text": "one"}\n{"text": 2}\n')
    (tmp_path / "1.jsonl").write_text('{"text": "one"}\n')
    files = [tmp_path / "0.jsonl", tmp_path / "1.jsonl"]
    run("text", files, tmp_path / "out", lose=0.5)
    records = sorted((tmp_path / "out" / ".prepared").glob("0000?.json"))
    for record in records:
        known = json.loads(record.read_text())
        del known["reader"]  # as the first version wrote it
        record.write_text(json.dumps(known))
    run("text", files, tmp_path / "out", lose=0.5)
    assert ["reader" in json.loads(record.read_text()) for record in records] == [True, False]


@pytest.mark.slow
def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path) -> None:
    files = text_files(tmp_path / "in", ["one", "two"])
    for workers in (1, 3):
        convert([str(f) for f in files], tmp_path / str(workers), options=Options("text", texts="line"), workers=workers)
    one, three = ({p.name: p.read_bytes() for p in (tmp_path / n).glob("*.jsonl")} for n in ("1", "3"))
    assert one == three


def test_the_command_line(tmp_path: Path, demo_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From published files to an index and its report."""
    images = write_images(tmp_path / "images", ["0.jpg"])
    (tmp_path / "vizwiz.json").write_text(json.dumps([{"image": "0.jpg", "question": "q?", "answers": [{"answer": "a"}]}]))
    (tmp_path / "a.jsonl").write_text('{"body": {"raw": "a text"}}\n')
    data = tmp_path / "DATA"
    arguments = ["--format", "vizwiz", "--images", str(images), "--out", str(data / "train" / "vizwiz"), "--workers", "1"]
    cli.main(["prepare", "vqa", str(tmp_path / "vizwiz.json"), *arguments])
    cli.main(
        ["prepare", "text", str(tmp_path / "a.jsonl"), "--text-key", "body.raw", "--out", str(data / "train" / "web"), "--workers", "1"]
    )
    assert f"index it: megatron-mm prepare index {data}" in capsys.readouterr().out
    cli.main(["prepare", "index", str(data), "--tokenizer", str(demo_data / "tokenizer.model"), "--workers", "1"])
    cli.main(["prepare", "report", str(data), "--json", str(tmp_path / "report.json")])
    kinds = {name: source["kind"] for name, source in json.loads((tmp_path / "report.json").read_text())["sources"].items()}
    assert kinds == {"train/vizwiz": "tasks", "train/web": "text"}


def test_inputs_that_are_nothing_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"input .*nowhere.jsonl does not exist"):
        run("text", [tmp_path / "nowhere.jsonl"], tmp_path / "out")
    (tmp_path / "a.pdf").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a.pdf is in an unsupported format"):
        run("text", [tmp_path / "a.pdf"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"folder of images .*none does not exist"):
        run("mmc4", [tmp_path / "a.pdf"], tmp_path / "out", images=str(tmp_path / "none"))


def test_inputs_that_are_not_given_any_more_are_an_error(tmp_path: Path) -> None:
    """Their shards may be all that is left of them: they are neither replaced nor counted as shards of the current inputs."""
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_text('{"text": "a red circle"}\n')
    run("text", sorted(tmp_path.glob("*.jsonl")), tmp_path / "out")
    for inputs in (["0.jsonl"], ["1.jsonl", "2.jsonl"]):
        with pytest.raises(ValueError, match="which is not among the inputs of this command"):
            run("text", [tmp_path / name for name in inputs], tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.jsonl"))) == 3


def test_fields_that_are_there_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "a red circle", "id": 7}\n')
    with pytest.raises(ValueError, match="The fields of the first one are content, id: choose with --text-key"):
        run("text", [tmp_path / "a.jsonl"], tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"malformed texts list: 1\. The fields of the first one are content, id: a document needs `texts`"
    ):
        run("obelics", [tmp_path / "a.jsonl"], tmp_path / "documents")
