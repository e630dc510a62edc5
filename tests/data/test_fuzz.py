"""Property tests: on any bytes, preparation neither crashes nor hangs, and no data is lost without being counted.

Ten thousand inputs of each kind in `make test-all`, fifty otherwise.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.data_files import picture, write_tar

from megatron_mm.data.image_transform import ImageTransform
from megatron_mm.data.load.decode import PillowDecoder
from megatron_mm.data.prepare.published.layouts import LAYOUTS, Context, LeftOut
from megatron_mm.data.prepare.published.losses import BadRecord, DamagedFile
from megatron_mm.data.prepare.published.records import iterate_records
from megatron_mm.data.prepare.samples import Losses, Reading, ShardRows, check_image, iterate_shard, read_shard
from megatron_mm.data.sources.shards import read_range
from megatron_mm.data.sources.tar import EndMarker, Skipped, TarFile, walk_tar
from megatron_mm.data.text.chat import Rendering, chat_template
from megatron_mm.data.text.documents import parse_document
from megatron_mm.data.text.items import BadDocument, encode_items
from megatron_mm.data.text.tokenizer import Tokenizer

MANY = 10_000
KINDS = ("pairs", "interleaved", "text", "conversations", "tasks")
RENDERING = Rendering(chat_template("plain"))


def inputs(count: int) -> settings:
    return settings(max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def tokenizer(demo_data: Path) -> Tokenizer:
    return Tokenizer.open(demo_data / "tokenizer.model")


# ---------------------------------------------------------------------------------------------------------------------- tars

NAMES = ["a.jpg", "a.txt", "b.0.png", "b.json", "._c.jpg", "d/e.jpg", "d/e.txt", "x" * 150 + ".txt", "é.txt"]
TYPES = [tarfile.REGTYPE, tarfile.REGTYPE, tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE]
MEMBERS = st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(TYPES), st.binary(max_size=1500)), max_size=8)
DAMAGE = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=40)), max_size=4)


def tar_of(members: list[tuple[str, bytes, bytes]], form: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, kind, data in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            info.size = len(data) if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def damaged(data: bytes, damage: list[tuple[float, bytes]], keep: float) -> bytes:
    changed = bytearray(data)
    for place, patch in damage:
        begin = int(place * len(changed))
        changed[begin : begin + len(patch)] = patch
    return bytes(changed[: int(keep * len(changed))])


def check_whole_tar(members: list[tuple[str, bytes, bytes]], form: int) -> None:
    """Check that all regular files are found with their bytes, also if another tar follows."""
    data = tar_of(members, form)
    found = [entry for entry in walk_tar(io.BytesIO(data + data), 2 * len(data)) if isinstance(entry, TarFile)]
    wanted = [(n, d) for n, kind, d in members if kind == tarfile.REGTYPE and not n.rpartition("/")[2].startswith(".")]
    plain = [(entry.name, (data + data)[entry.offset : entry.offset + entry.size]) for entry in found]
    links = [name for name, kind, _ in members if kind in (tarfile.LNKTYPE, tarfile.SYMTYPE)]
    assert ([entry for entry in plain if entry in wanted or entry[0] not in links] and plain) or not wanted
    for entry in wanted:
        assert plain.count(entry) >= 2


def check_damaged_tar(members: list[tuple[str, bytes, bytes]], damage: list[tuple[float, bytes]], keep: float) -> None:
    """Check that all entries are inside the shard, and that missing files are reported as skipped."""
    data = damaged(tar_of(members, tarfile.GNU_FORMAT), damage, keep)
    entries = list(walk_tar(io.BytesIO(data), len(data)))
    for entry in entries:
        if isinstance(entry, TarFile):
            assert entry.offset >= 0 and entry.offset + entry.size <= len(data)
        elif isinstance(entry, Skipped):
            assert 0 <= entry.size <= len(data)
        else:
            assert isinstance(entry, EndMarker)
    wanted = sum(kind == tarfile.REGTYPE for _, kind, _ in members)
    if sum(isinstance(entry, TarFile) for entry in entries) < wanted:
        assert any(isinstance(entry, Skipped) for entry in entries), "files are gone and nothing says so"


@given(MEMBERS, st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
@inputs(50)
def test_tars_come_out_as_they_went_in(members: list[tuple[str, bytes, bytes]], form: int) -> None:
    if form == tarfile.USTAR_FORMAT:
        members = [member for member in members if len(member[0]) < 100]
    check_whole_tar(members, form)


@given(MEMBERS, DAMAGE, st.floats(0, 1))
@inputs(50)
def test_damaged_tars_lose_nothing_unseen(members: list[tuple[str, bytes, bytes]], damage: list[tuple[float, bytes]], keep: float) -> None:
    check_damaged_tar(members, damage, keep)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@given(MEMBERS, DAMAGE, st.floats(0, 1))
@inputs(MANY)
def test_ten_thousand_damaged_tars(members: list[tuple[str, bytes, bytes]], damage: list[tuple[float, bytes]], keep: float) -> None:
    check_damaged_tar(members, damage, keep)


@given(st.binary(max_size=3000))
@inputs(50)
def test_any_bytes_are_a_tar_or_damage(data: bytes) -> None:
    assert list(walk_tar(io.BytesIO(data), len(data))), "not a word about a shard of which nothing is read"


# ----------------------------------------------------------------------------------------------------------------- documents

KEYS = st.sampled_from(
    [
        *("text", "caption", "items", "texts", "images", "image", "text_list", "image_info", "image_name", "matched_text_index", "type"),
        *("conversations", "messages", "from", "value", "role", "content", "task", "question", "answer", "choices", "context"),
    ]
)
WORDS = ["0.jpg", "jpg", "<image>", "vqa", "caption", "human", "gpt", "user", "assistant"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
DOCUMENTS = st.dictionaries(KEYS, VALUES, max_size=5)


def check_document(document: Any, tokenizer: Tokenizer) -> None:
    """Check that a document of any kind yields items or a reason, and that encoding is deterministic."""
    data = json.dumps(document).encode()
    for kind in KINDS:
        try:
            items = parse_document(kind, data, is_json=True, rendering=RENDERING)
        except BadDocument as reason:
            assert 0 < len(str(reason)) < 80
            continue
        assert encode_items(items, tokenizer) == encode_items(items, tokenizer)


def check_record(record: Any) -> None:
    for layout in LAYOUTS.values():
        try:
            layout(record, Context(image_keys=("image",), text_keys=("text", "caption")))
        except (BadDocument, LeftOut) as reason:
            assert 0 < len(str(reason)) < 100


@given(DOCUMENTS)
@inputs(50)
def test_any_json_is_a_document_or_has_a_reason(tokenizer: Tokenizer, document: Any) -> None:
    check_document(document, tokenizer)
    check_record(document)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@given(DOCUMENTS)
@inputs(MANY)
def test_ten_thousand_documents(tokenizer: Tokenizer, document: Any) -> None:
    check_document(document, tokenizer)
    check_record(document)


@given(st.binary(max_size=300), st.sampled_from(KINDS), st.booleans())
@inputs(50)
def test_any_bytes_are_a_document_or_have_a_reason(data: bytes, kind: Any, is_json: bool) -> None:
    try:
        parse_document(kind, data, is_json=is_json, rendering=RENDERING)
    except BadDocument as reason:
        assert str(reason)


@given(st.text(max_size=60) | st.lists(st.sampled_from(["<s>", "</s>", "<image>", "<pad>", " ", "a", "\n"]), max_size=9).map("".join))
@inputs(50)
def test_no_text_becomes_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    controls = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.image_id}
    assert not controls & set(tokenizer.encode(text.encode("utf-8", "replace").decode()))


# -------------------------------------------------------------------------------------------------------------------- images

FORMS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
WHOLE = {form: picture(form=form) for form in FORMS}


def check_bytes_of_image(form: str, damage: list[tuple[float, bytes]], keep: float, decoder: PillowDecoder) -> None:
    """Check that accepted images decode, and that decoding refused ones raises no exception."""
    data = damaged(WHOLE[form], damage, keep)
    try:
        width, height = check_image(data)
    except BadDocument as reason:
        assert str(reason).startswith("image ")
        decoder.decode([data])
        return
    assert width > 0 and height > 0
    assert decoder.decode([data]).ok.all()


@pytest.fixture(scope="module")
def decoder() -> Any:
    made = PillowDecoder(ImageTransform(8, fill=(1, 2, 3)), threads=1)
    yield made
    made.close()


@given(st.sampled_from(FORMS), DAMAGE, st.floats(0, 1))
@inputs(50)
def test_damaged_images_are_refused_or_decode(decoder: PillowDecoder, form: str, damage: list[tuple[float, bytes]], keep: float) -> None:
    check_bytes_of_image(form, damage, keep, decoder)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@given(st.sampled_from(FORMS), DAMAGE, st.floats(0, 1))
@inputs(MANY)
def test_ten_thousand_damaged_images(decoder: PillowDecoder, form: str, damage: list[tuple[float, bytes]], keep: float) -> None:
    check_bytes_of_image(form, damage, keep, decoder)


# ------------------------------------------------------------------------------------------------------- parquet, whole shards


def parquet_bytes() -> bytes:
    buffer = io.BytesIO()
    rows = pyarrow.table({"text": [f"text {n}" for n in range(40)], "image": [bytes([n]) * n for n in range(40)]})
    pyarrow.parquet.write_table(rows, buffer, row_group_size=10)
    return buffer.getvalue()


PARQUET = parquet_bytes()


def check_parquet(damage: list[tuple[float, bytes]], keep: float) -> None:
    """Check that a damaged file yields all of its 40 rows or reports missing ones."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "0.parquet"
        path.write_bytes(damaged(PARQUET, damage, keep))
        given_rows = lost = 0
        try:
            for record in iterate_records(str(path)):
                lost += record.count if isinstance(record, BadRecord) else 0
                given_rows += not isinstance(record, BadRecord)
        except DamagedFile:
            lost += 1
        assert given_rows >= 40 or lost


@given(DAMAGE, st.floats(0.9, 1))
@inputs(50)
def test_damaged_parquet_says_what_is_missing(damage: list[tuple[float, bytes]], keep: float) -> None:
    check_parquet(damage, keep)


def check_shard(damage: list[tuple[float, bytes]], keep: float, whole: bytes, tokenizer: Tokenizer) -> None:
    """Prepare a damaged shard of pairs; check that a run can read its rows, and that missing samples are counted."""
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "0.tar"
        shard.write_bytes(damaged(whole, damage, keep))
        rows: ShardRows = read_shard(shard, number=0, reading=Reading("pairs", RENDERING), tokenizer=tokenizer)
        for row in rows.samples:
            data = read_range(shard, int(row["offset"]), int(row["size"]))
            items = parse_document("pairs", data, is_json=False, rendering=None)
            counted = [len(ids) for ids in encode_items(items, tokenizer)]
            assert sum(counted) == row["text_tokens"], "a run finds what was counted"
        losses = Losses()
        assert len(list(iterate_shard(shard, losses, "first"))) >= len(rows.samples)
        if len(rows.samples) < PAIRS:
            assert rows.losses.rejected or rows.losses.skipped, "samples are gone and nothing says so"
        assert np.isin(rows.items["is_image"], (0, 1)).all()


PAIRS = 6


@pytest.fixture(scope="module")
def whole_shard(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    members = {f"{n}.{e}": data for n in range(PAIRS) for e, data in (("png", picture(form="PNG", size=(9, 9))), ("txt", b"a red circle"))}
    return write_tar(tmp_path_factory.mktemp("fuzz") / "0.tar", members).read_bytes()


@given(DAMAGE, st.floats(0, 1))
@inputs(50)
def test_damaged_shards_of_pairs(tokenizer: Tokenizer, whole_shard: bytes, damage: list[tuple[float, bytes]], keep: float) -> None:
    check_shard(damage, keep, whole_shard, tokenizer)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@given(DAMAGE, st.floats(0, 1))
@inputs(MANY // 5)
def test_thousands_of_damaged_shards_of_pairs(
    tokenizer: Tokenizer, whole_shard: bytes, damage: list[tuple[float, bytes]], keep: float
) -> None:
    check_shard(damage, keep, whole_shard, tokenizer)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@given(DAMAGE, st.floats(0.9, 1))
@inputs(MANY // 5)
def test_thousands_of_damaged_parquet_files(damage: list[tuple[float, bytes]], keep: float) -> None:
    check_parquet(damage, keep)
