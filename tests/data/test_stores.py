"""Shards in an object store: a real S3 server behind a proxy that makes requests fail as networks and servers do."""

from __future__ import annotations

import http.client
import shutil
import socket
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from support.data_files import ALONE, experiment

from megatron_mm.data.prepare.index import IndexOptions, prepare_index
from megatron_mm.data.prepare.published.convert import Options, convert
from megatron_mm.data.prepare.tokenizer import prepare_tokenizer
from megatron_mm.data.sources import index_copies, stores
from megatron_mm.data.sources.index import move_to_store, open_index, open_split
from megatron_mm.data.sources.stores import ObjectStore, RangeCache, cache_of_environment
from megatron_mm.platform.local_copies import CACHE_VARIABLE
from megatron_mm.run.data import TrainingData, open_tokenizer

pytest.importorskip("moto.server")
pytest.importorskip("s3fs")


class Gate(ThreadingHTTPServer):
    """Passes requests on to a server, except those in `faults`."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = port
        self.faults: list[str] = []
        """Faults of the next range requests, in order: "503", "cut", "hang" or "reset"; others pass."""
        self.seen: Counter[str] = Counter()
        self.release = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Gate

    def _pass_on(self) -> None:
        is_range = self.command == "GET" and "Range" in self.headers
        self.server.seen["ranges"] += is_range
        fault = self.server.faults.pop(0) if is_range and self.server.faults else None
        if fault == "hang":
            self.server.release.wait(30)
        if fault in ("hang", "reset"):
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if fault == "503":
            body = b"<Error><Code>SlowDown</Code><Message>slow down</Message></Error>"
            self._answer(503, {"Content-Type": "application/xml", "Content-Length": str(len(body))}, body)
            return
        behind = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=30)
        behind.request(self.command, self.path, self.rfile.read(int(self.headers.get("Content-Length") or 0)), dict(self.headers))
        answer = behind.getresponse()
        body = answer.read()
        headers = {
            name: value for name, value in answer.getheaders() if name.lower() not in ("transfer-encoding", "connection", "date", "server")
        }
        if self.command != "HEAD":
            headers["Content-Length"] = str(len(body))
        self._answer(answer.status, headers, body[: len(body) // 2] if fault == "cut" else body)
        if fault == "cut":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def gate(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """The proxy, with its address and credentials in the environment, which is the only place that has them."""
    import s3fs

    gate = Gate(server)
    threading.Thread(target=gate.serve_forever, daemon=True).start()
    for name, value in (
        ("ACCESS_KEY_ID", "someone"),
        ("SECRET_ACCESS_KEY", "secret"),
        ("ENDPOINT_URL", gate.url),
        ("DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(stores, "TIMEOUT", 2)
    monkeypatch.setattr(stores, "FIRST_WAIT", 0.01)
    s3fs.S3FileSystem.clear_instance_cache()
    yield gate
    gate.release.set()
    gate.shutdown()
    s3fs.S3FileSystem.clear_instance_cache()


def upload(url: str, files: dict[str, bytes]) -> None:
    import fsspec

    remote = fsspec.filesystem("s3")
    bucket = url.removeprefix("s3://").partition("/")[0]
    if not remote.exists(bucket):
        remote.mkdir(bucket)
    for name, content in files.items():
        remote.pipe_file(f"{url}/{name}", content)


CONTENT = bytes(range(256)) * 400


def test_ranges_are_read(gate: Gate) -> None:
    upload("s3://data/one", {"0.tar": CONTENT})
    store = ObjectStore("s3://data/one/")
    for offset, size in ((0, 10), (255, 1), (1000, 70_000), (len(CONTENT) - 3, 3), (5, 0)):
        assert store.read("0.tar", offset, size) == CONTENT[offset : offset + size]
    assert gate.seen["ranges"] == 4, "a request for each range, and none for nothing"


@pytest.mark.parametrize("fault", ["503", "cut", "reset", "hang"])
def test_a_read_is_tried_again_after_a_fault(gate: Gate, fault: str) -> None:
    upload("s3://data/one", {"0.tar": CONTENT})
    waits: list[float] = []
    store = ObjectStore("s3://data/one", sleep=waits.append)
    assert store.read("0.tar", 0, 10) == CONTENT[:10]
    gate.faults = [fault] if fault == "hang" else [fault] * 3
    assert store.read("0.tar", 100, 5000) == CONTENT[100:5100]
    assert len(waits) <= 3 and not gate.faults and gate.seen["ranges"] > 2
    assert waits or fault in ("reset", "hang"), "the client itself opens a broken connection again"
    assert all(0.5 <= wait / (0.01 * 2**number) <= 1.5 for number, wait in enumerate(waits)), "twice as long each time"


def test_faults_without_end_are_an_error_that_names_the_object(gate: Gate) -> None:
    upload("s3://data/one", {"0.tar": CONTENT})
    gate.faults = ["503"] * 50
    with pytest.raises(OSError, match=r"s3://data/one/0.tar cannot be read after 3 attempts"):
        ObjectStore("s3://data/one", attempts=3, sleep=lambda seconds: None).read("0.tar", 0, 10)


def test_what_is_not_there_is_an_error_at_once(gate: Gate) -> None:
    upload("s3://data/one", {"0.tar": CONTENT})
    store = ObjectStore("s3://data/one", sleep=lambda seconds: pytest.fail("it waits for an object that is not there"))
    with pytest.raises(FileNotFoundError, match=r"s3://data/one/1.tar cannot be read"):
        store.read("1.tar", 0, 10)


def test_an_object_that_ends_early_is_an_error(gate: Gate) -> None:
    upload("s3://data/one", {"0.tar": CONTENT})
    with pytest.raises(OSError, match=r"received 10 of 20 bytes"):
        ObjectStore("s3://data/one", attempts=2, sleep=lambda seconds: None).read("0.tar", len(CONTENT) - 10, 20)


def test_ranges_are_kept_on_the_disk_up_to_a_limit(gate: Gate, tmp_path: Path) -> None:
    upload("s3://data/one", {"0.tar": CONTENT})
    store = ObjectStore("s3://data/one", cache=RangeCache(tmp_path / "cache", 10_000))
    for offset in (0, 1000, 2000, 0, 1000, 2000):
        assert store.read("0.tar", offset, 1000) == CONTENT[offset : offset + 1000]
    assert gate.seen["ranges"] == 3
    for offset in range(0, 60_000, 1000):
        store.read("0.tar", offset, 1000)
        kept = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*"))
        assert kept <= 10_000
    assert kept >= 8000
    before = gate.seen["ranges"]
    assert store.read("0.tar", 59_000, 1000) == CONTENT[59_000:60_000] and gate.seen["ranges"] == before
    for path in (tmp_path / "cache").glob("*/*"):
        path.write_bytes(b"half")
    assert store.read("0.tar", 59_000, 1000) == CONTENT[59_000:60_000], "a file that was cut off is read anew"


def test_the_cache_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    assert cache_of_environment() is None
    monkeypatch.setenv(CACHE_VARIABLE, f"{tmp_path}/c:3GB")
    found = cache_of_environment()
    assert found is not None and (found.folder, found.limit) == (tmp_path / "c", 3 * 10**9)
    monkeypatch.setenv(CACHE_VARIABLE, "200")
    with pytest.raises(ValueError, match=r"MEGATRON_MM_CACHE=200 is not FOLDER:SIZE"):
        cache_of_environment()


def load(path: Path) -> list[Any]:
    settings = experiment(path, mixture={"pairs": 0.5, "text": 0.5})
    loader = TrainingData(settings, ALONE, open_tokenizer(settings))
    try:
        return [batch for _ in range(2) for batch in next(loader).micro_batches]
    finally:
        loader.close()


def test_training_reads_the_same_batches_from_a_store_through_faults(gate: Gate, demo_data: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(demo_data, tmp_path / "data"))
    expected = load(data)
    for name in ("pairs", "text"):
        source, url = data / "train" / name, f"s3://data/train/{name}"
        shards = [path for path in source.iterdir() if path.is_file()]
        with pytest.raises(ValueError, match="cannot be read"):
            move_to_store(source, url)
        upload(url, {path.name: path.read_bytes() for path in shards})
        assert move_to_store(source, url) == len(shards)
        for path in shards:
            path.unlink()
        assert open_index(source).store == url
    gate.faults = ["ok", "503", "ok", "ok", "cut", "reset"] * 10
    found = load(data)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.token_ids, other.token_ids) and torch.equal(one.pixels, other.pixels)
    upload("s3://data/train/text", {"00000.jsonl": b"another"})
    with pytest.raises(ValueError, match=r"s3://data/train/text/00000.jsonl has 7 bytes, but had \d+ when it was indexed"):
        open_index(data / "train" / "text")


def test_shards_are_indexed_in_a_store(gate: Gate, demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Despite faults, the index equals that of local files; only changed shards are read again."""
    data, out, files, scratch = Path("s3://lake/mine"), tmp_path / "index", tmp_path / "files", tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    for name in ("pairs", "text"):
        shutil.copytree(demo_data / "train" / name, files / "train" / name)
    shutil.copyfile(demo_data / "tokenizer.model", files / "tokenizer.model")
    upload("s3://lake/mine", {path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*") if path.is_file()})
    upload("s3://lake/mine", {"train/pairs/00000_stats.json": b"{}", "train/pairs/.nv-meta/index.sqlite": b"x"})
    with pytest.raises(ValueError, match=r"^s3://lake/mine is in an object store: use --index-dir"):
        prepare_index(data)
    gate.faults = ["503", "ok", "cut", "ok", "reset"] * 3
    summary = prepare_index(data, options=IndexOptions(index_dir=out))
    local = prepare_index(files, options=IndexOptions(index_dir=tmp_path / "local"))
    assert summary.sources == local.sources
    for name in ("train/pairs", "train/text"):
        found, expected = open_index(out / name), open_index(tmp_path / "local" / name)
        assert found.store == f"s3://lake/mine/{name}" and list(found.shards) == list(expected.shards)
        assert (found.sample_rows == expected.sample_rows).all() and (found.item_rows == expected.item_rows).all()
        assert found.document(0) == expected.document(0)
    for one, other in zip(load(out), load(tmp_path / "local"), strict=True):
        assert torch.equal(one.token_ids, other.token_ids) and torch.equal(one.pixels, other.pixels)
    gate.seen.clear()
    prepare_index(data, options=IndexOptions(index_dir=out))
    assert gate.seen["ranges"] == 1 + sum(len(open_index(out / name).shards) for name in summary.sources), "tokenizer and beginnings"
    upload("s3://lake/mine", {"train/text/00000.jsonl": b'{"text": "a red cross"}\n{"text": "broken'})
    changed = prepare_index(data / "train" / "text", tokenizer=files / "tokenizer.model", options=loose(out)).sources["train/text"]
    assert changed.rejected == {"malformed JSON": 1}
    assert not list(scratch.iterdir()), "nothing stays"


def loose(index_dir: Path) -> IndexOptions:
    return IndexOptions(index_dir=index_dir, max_rejected=0.9)


def test_parts_of_a_store_are_merged(gate: Gate, demo_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = demo_data / "train" / "pairs"
    shard = next(path for path in source.iterdir() if path.suffix == ".tar").read_bytes()
    upload("s3://lake/train/two", {"0.tar": shard, "1.tar": shard[: len(shard) // 2]})
    options, model = loose(tmp_path / "index"), demo_data / "tokenizer.model"
    for part in ("0/2", "1/2"):
        prepare_index(Path("s3://lake/train/two"), tokenizer=model, options=options, shards=part)
    merged = prepare_index(Path("s3://lake/train/two"), tokenizer=model, options=options, merge_only=True)
    assert merged.sources["train/two"].rejected["broken shard"] == 1 and len(open_index(tmp_path / "index" / "train" / "two").shards) == 2
    said = [record.getMessage() for record in caplog.records]
    assert any("shard s3://lake/train/two/1.tar ends without an end marker" in message for message in said)
    assert not any("mirror" in message for message in said), "addresses are named, and not where their copies lie"
    with pytest.raises(ValueError, match=r"source s3://lake/train/two .*would be lost"):
        prepare_index(Path("s3://lake/train/two"), tokenizer=model, options=IndexOptions(index_dir=tmp_path / "other", max_rejected=0))
    with pytest.raises(ValueError, match=r"s3://lake/nothing contains no objects"):
        prepare_index(Path("s3://lake/nothing"), options=options)
    gate.faults = ["503"] * 40
    with pytest.raises(OSError, match=r"s3://lake/train/two/\d.tar cannot be read after 6 attempts"):
        prepare_index(Path("s3://lake/train/two"), tokenizer=model, options=IndexOptions(index_dir=tmp_path / "third"))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], None]:
    """Set up a cache folder; return a function that makes this process forget its copies, like a new process."""
    monkeypatch.setenv(CACHE_VARIABLE, f"{tmp_path / 'cache'}:100MB")
    index_copies._copied.cache_clear()
    return index_copies._copied.cache_clear


def test_an_index_in_a_store_is_copied_once_for_a_machine(
    gate: Gate, demo_data: Path, tmp_path: Path, fresh: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tmp_path / "files"
    for name in ("pairs", "text"):
        shutil.copytree(demo_data / "train" / name, files / "train" / name, ignore=shutil.ignore_patterns("*.rows"))
    shutil.copyfile(demo_data / "tokenizer.model", files / "tokenizer.model")
    upload("s3://pool/mine", {path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*") if path.is_file()})
    expected, address = load(files), Path("s3://pool/mine")
    gate.faults = ["503", "ok", "cut", "ok", "reset"] * 4
    for one, other in zip(load(address), expected, strict=True):
        assert torch.equal(one.token_ids, other.token_ids) and torch.equal(one.pixels, other.pixels)
    (home,) = (path for path in (tmp_path / "cache" / "indexes").iterdir() if path.is_dir())
    assert experiment(address).data.folder == home and not list(home.rglob("*.tar"))
    assert open_index(home / "train" / "pairs").store == "s3://pool/mine/train/pairs"
    fresh()
    gate.seen.clear()
    assert index_copies.data_folder(address, sources=["pairs", "text"]) == home
    assert gate.seen["ranges"] == 3, "what is there is not read again: two of meta.json, and the tokenizer"
    (files / "train" / "text" / "00000.jsonl").write_text('{"text": "a red cross"}\n')
    prepare_index(files / "train" / "text", tokenizer=files / "tokenizer.model")
    upload("s3://pool/mine", {path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*") if path.is_file()})
    fresh()
    index_copies.data_folder(address, sources=["pairs", "text"])
    assert len(open_index(home / "train" / "text")) == 1 and len(list((home / "train" / "text" / "index").glob("arrays-*"))) == 1
    fresh()
    monkeypatch.setenv(CACHE_VARIABLE, f"{tmp_path / 'small'}:0MB")
    with pytest.raises(ValueError, match=r"index of s3://pool/mine/train/pairs has 0\.\d\d GB, more than MEGATRON_MM_CACHE has room for"):
        index_copies.data_folder(address, sources=["pairs"])


def test_what_is_no_index_in_a_store(gate: Gate, fresh: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    upload("s3://pool/none", {"train/pairs/0.tar": CONTENT})
    with pytest.raises(ValueError, match=r"s3://pool/none has no index of the sources pairs: run .*--index-dir"):
        index_copies.data_folder(Path("s3://pool/none"), sources=["pairs"])
    upload("s3://pool/none", {"train/pairs/index/meta.json": b"{}"})
    with pytest.raises(ValueError, match=r"s3://pool/none/train/pairs/index/meta.json does not describe the arrays"):
        index_copies.data_folder(Path("s3://pool/none"), sources=["pairs"])
    monkeypatch.delenv(CACHE_VARIABLE)
    with pytest.raises(ValueError, match=r"^s3://pool/none is in an object store: set MEGATRON_MM_CACHE"):
        index_copies.data_folder(Path("s3://pool/none"), sources=["pairs"])


def test_an_index_in_a_store_is_an_error_that_says_what_to_copy(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^s3://bucket/data is in an object store, not on this machine: an index must be on a local disk.*aws s3 sync"
    ):
        open_split(Path("s3://bucket/data"), "train", sources=["pairs"])
    with pytest.raises(ValueError, match=r"^s3://bucket/data is in an object store.*copy it to a local disk"):
        prepare_tokenizer(Path("s3://bucket/data"), out=tmp_path / "tokenizer.model", vocab_size=100)
    with pytest.raises(ValueError, match=r"^gs://bucket/out is in an object store"):
        convert(["a.jsonl"], Path("gs://bucket/out"), options=Options("text"))
