"""An index is complete, of a known version, and matches its shards; otherwise an error states the remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.data_files import picture, write_tar

from megatron_mm.data.prepare.index import prepare_index
from megatron_mm.data.sources.index import open_index, open_split
from megatron_mm.data.sources.index_files import write_index
from megatron_mm.data.sources.rows import ITEM, SAMPLE
from megatron_mm.data.sources.shard_table import Shard, ShardTable

ONE_SHARD = ShardTable.of([Shard("0.tar", 1)])


@pytest.fixture
def tokenizer(demo_data: Path) -> Path:
    return demo_data / "tokenizer.model"


def test_opening_a_split_names_what_is_missing(demo_data: Path, tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a directory"):
        open_split(tmp_path / "nowhere", "train", sources=["pairs"])
    with pytest.raises(ValueError, match=r"has no folder 'validation'; it has"):
        open_split(demo_data, "validation", sources=["pairs"])
    with pytest.raises(ValueError, match=r"lacks the sources \['video'\].*it has \['conversations', 'interleaved', 'pairs'") as found:
        open_split(demo_data, "train", sources=["pairs", "video"])
    assert "--data.mixture conversations=0.2 interleaved=0.2 pairs=0.2 tasks=0.2 text=0.2" in str(found.value)
    with pytest.raises(ValueError, match=r"lacks the sources \['piars'\].*: did you mean pairs\?"):
        open_split(demo_data, "train", sources=["piars", "text"])
    source = tmp_path / "train" / "pairs"
    write_tar(source / "0.tar", {"0.jpg": picture(), "0.txt": b"x"})
    with pytest.raises(ValueError, match=r"has no index: run `megatron-mm prepare index"):
        open_split(tmp_path, "train", sources=["pairs"])
    prepare_index(tmp_path, tokenizer=tokenizer)
    write_tar(source / "0.tar", {"0.jpg": picture(), "0.txt": b"x", "1.txt": b"more" * 5000})
    with pytest.raises(ValueError, match=r"when it was indexed"):
        open_split(tmp_path, "train", sources=["pairs"])


def test_rows_say_where_the_bytes_are(demo_data: Path) -> None:
    (index,) = open_split(demo_data, "train", sources=["interleaved"])
    for row in index.sample_rows[:20]:
        content = (index.root / index.shards[int(row["shard"])]).read_bytes()
        document = json.loads(content[int(row["offset"]) : int(row["offset"]) + int(row["size"])])
        items = index.item_rows[row["first_item"] : row["first_item"] + row["num_items"]]
        assert [bool(item["is_image"]) for item in items] == ["image" in item for item in document["items"]]
        assert int(row["num_images"]) == int(items["is_image"].sum()) and int(row["text_tokens"]) == int(items["tokens"].sum())
        for item in items[items["is_image"] == 1]:
            assert content[int(item["offset"]) :][:4] in (b"\x89PNG", b"RIFF") or content[int(item["offset"]) :][:2] == b"\xff\xd8"


def test_an_index_is_mapped_and_not_read(demo_data: Path) -> None:
    (index,) = open_split(demo_data, "train", sources=["pairs"])
    assert isinstance(index.sample_rows.base, np.memmap) and not index.sample_rows.flags.writeable


def test_an_index_of_another_version_or_a_lost_shard_is_an_error(demo_data: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(demo_data / "train" / "pairs", tmp_path / "pairs"))
    meta = source / "index" / "meta.json"
    content = json.loads(meta.read_text())
    meta.write_text(json.dumps({**content, "version": 99}))
    with pytest.raises(ValueError, match=r"meta.json has version 99, but this program reads 2 and 3 and 4: run `megatron-mm prepare"):
        open_index(source)
    meta.write_text(json.dumps(content))
    (source / "00000.tar").unlink()
    with pytest.raises(ValueError, match=r"shard .*00000.tar is missing, but had \d+ bytes when it was indexed"):
        open_index(source)


def test_a_source_whose_samples_are_all_gone_is_named(demo_data: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(demo_data / "train" / "pairs", tmp_path / "train" / "pairs"))
    meta = json.loads((source / "index" / "meta.json").read_text())
    write_index(source, meta=meta, shards=ShardTable.of([]), num_samples=0, num_items=0, parts=[])
    with pytest.raises(ValueError, match=r"pairs has no usable sample .*drop it from data.mixture"):
        open_split(tmp_path, "train", sources=["pairs"])


@pytest.fixture
def pairs(demo_data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_data / "train" / "pairs", tmp_path / "train" / "pairs"))


def arrays(source: Path) -> Path:
    (folder,) = (source / "index").glob("arrays-*")
    return folder


def as_version(number: int, source: Path) -> None:
    """Rewrite the index as an earlier version wrote it."""
    meta, index = json.loads((source / "index" / "meta.json").read_text()), open_index(source)
    shards = list(index.shards.shards())
    meta["shards"] = {shard.name: shard.size for shard in shards}
    for name in ("shards.npy", "names.npy"):
        (arrays(source) / name).unlink()
        del meta["arrays"]["files"][name]
    if number == 3:
        meta["stamps"] = {shard.name: [shard.modified, shard.digest] for shard in shards}
    else:
        for name in ("samples.npy", "items.npy"):
            (arrays(source) / name).rename(source / "index" / name)
        shutil.rmtree(arrays(source))
        del meta["arrays"]
    (source / "index" / "meta.json").write_text(json.dumps({**meta, "version": number}))


@pytest.mark.parametrize("version", [2, 3])
def test_an_index_of_an_earlier_version_is_read(pairs: Path, version: int) -> None:
    new = open_index(pairs)
    sizes, images = new.sizes(slice(3, 40)), new.image_sizes(slice(3, 40))
    document, image = new.document(5), new.image(5, 0)
    as_version(version, pairs)
    old = open_index(pairs)
    assert (old.size_rows is None) == (version == 2) and len(old) == len(new) and list(old.shards) == list(new.shards)
    assert (old.sizes(slice(3, 40)).text_tokens == sizes.text_tokens).all() and (
        old.image_sizes(slice(3, 40)).widths == images.widths
    ).all()
    assert old.document(5) == document and old.image(5, 0) == image and open_index(pairs, check=False).image(5, 0) == image


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda source: (arrays(source) / "items.npy").write_bytes(b""), r"items.npy cannot be read"),
        (lambda source: (arrays(source) / "items.npy").unlink(), r"items.npy cannot be read"),
        (
            lambda source: (arrays(source) / "samples.npy").write_bytes((arrays(source) / "samples.npy").read_bytes()[:2000]),
            r"cannot be read",
        ),
        (lambda source: np.save(arrays(source) / "samples.npy", np.zeros(120, SAMPLE)), r"is not the file that was written"),
        (lambda source: np.save(arrays(source) / "samples.npy", np.zeros(7, SAMPLE)), r"has 7 rows, but .*meta.json says 120"),
        (lambda source: np.save(arrays(source) / "samples.npy", np.zeros(120)), r"has rows of float64, expected"),
        (lambda source: np.save(arrays(source) / "samples.npy", np.array([{}] * 120)), r"cannot be read"),
        (lambda source: (source / "index" / "meta.json").write_text("{"), r"meta.json is damaged"),
        (lambda source: (source / "index" / "meta.json").write_text('{"version": 3}'), r"lacks kind, tokenizer, rejected"),
    ],
)
def test_a_damaged_index_is_an_error_that_says_what_to_do(pairs: Path, damage: object, message: str) -> None:
    damage(pairs)  # type: ignore[operator]
    with pytest.raises(ValueError, match=message) as error:
        open_index(pairs)
    assert "prepare index" in str(error.value)


@pytest.mark.parametrize("field", ["shard", "offset", "first_item", "num_items", "num_images"])
def test_rows_that_point_outside_are_an_error(pairs: Path, field: str) -> None:
    index = open_index(pairs)
    meta, samples = json.loads((pairs / "index" / "meta.json").read_text()), index.sample_rows.copy()
    samples[field][17] = 10**6 if field != "offset" else -1
    write_index(
        pairs, meta=meta, shards=index.shards, num_samples=len(samples), num_items=len(index.item_rows), parts=[(samples, index.item_rows)]
    )
    with pytest.raises(ValueError, match=r"row 17 points outside"):
        open_index(pairs)


@pytest.mark.parametrize("name", ["../secret.tar", "/etc/passwd", "a/../../b.tar"])
def test_a_shard_outside_of_the_source_is_an_error(pairs: Path, name: str) -> None:
    index, meta = open_index(pairs), json.loads((pairs / "index" / "meta.json").read_text())
    parts = [(index.sample_rows, index.item_rows)]
    write_index(
        pairs, meta=meta, shards=ShardTable.of([Shard(name, 3)] * 4), num_samples=len(index), num_items=len(index.item_rows), parts=parts
    )
    with pytest.raises(ValueError, match=r"which is outside its source"):
        open_index(pairs)
    with pytest.raises(ValueError, match=r"which is outside its source"):
        open_index(pairs, check=False).document(0)


def test_shards_are_mapped_and_meta_does_not_grow_with_them(tmp_path: Path, demo_data: Path) -> None:
    """Each of hundreds of processes therefore only reads the rows that it needs."""
    for number in range(300):
        write_tar(tmp_path / "many" / f"{number:05d}.tar", {"1.txt": b"a circle"})
    prepare_index(tmp_path / "many", tokenizer=demo_data / "tokenizer.model")
    index = open_index(tmp_path / "many", check=False)
    assert isinstance(index.shards, ShardTable) and isinstance(index.shards.rows.base, np.memmap)
    assert len(index.shards) == 300 and index.shards[123] == "00123.tar" and index.shards[-1] == "00299.tar" and index.document(299)
    assert (tmp_path / "many" / "index" / "meta.json").stat().st_size < 2000


def test_another_shard_of_the_same_size_is_an_error_and_a_copy_is_not(pairs: Path) -> None:
    shard = pairs / "00000.tar"
    content = bytearray(shard.read_bytes())
    shard.write_bytes(content)  # another time of modification
    assert len(open_index(pairs)) == 120
    content[:4096] = content[4096:8192]
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"00000.tar has the same size as when it was indexed, but other contents"):
        open_index(pairs)
    assert len(open_index(pairs, check=False)) == 120, "a process that relies on another's check"


def test_indexing_again_leaves_what_is_mapped_alone(pairs: Path) -> None:
    index = open_index(pairs)
    before = index.item_rows.tobytes()
    meta = json.loads((pairs / "index" / "meta.json").read_text())
    for remaining in (2, 2):
        write_index(pairs, meta=meta, shards=ONE_SHARD, num_samples=1, num_items=1, parts=[(np.zeros(1, SAMPLE), np.zeros(1, ITEM))])
        assert len(list((pairs / "index").glob("arrays-*"))) == remaining
    assert index.item_rows.tobytes() == before


def test_a_full_disk_leaves_the_index_as_it_was(pairs: Path) -> None:
    meta = json.loads((pairs / "index" / "meta.json").read_text())
    files = sorted(path.relative_to(pairs) for path in pairs.rglob("*"))

    def parts() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield np.zeros(1, SAMPLE), np.zeros(1, ITEM)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_index(pairs, meta=meta, shards=ONE_SHARD, num_samples=2, num_items=2, parts=parts())
    assert sorted(path.relative_to(pairs) for path in pairs.rglob("*")) == files and len(open_index(pairs)) == 120
