"""An index is whole, of this version, and of the shards that lie beside it; or an error says what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_files import picture, write_tar

from megatron_mm.data.prepare.index import prepare_index
from megatron_mm.data.sources.index import open_index, open_split


@pytest.fixture
def tokenizer(demo_data: Path) -> Path:
    return demo_data / "tokenizer.model"


def test_opening_a_split_names_what_is_missing(demo_data: Path, tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist"):
        open_split(tmp_path / "nowhere", "train", sources=["pairs"])
    with pytest.raises(ValueError, match=r"has no folder 'validation'; it has"):
        open_split(demo_data, "validation", sources=["pairs"])
    with pytest.raises(ValueError, match=r"lacks the sources \['video'\].*it has \['conversations', 'interleaved', 'pairs'"):
        open_split(demo_data, "train", sources=["pairs", "video"])
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
    with pytest.raises(ValueError, match=r"meta.json has version 99, this program reads 2: run `megatron-mm prepare index .*` again"):
        open_index(source)
    meta.write_text(json.dumps(content))
    (source / "00000.tar").unlink()
    with pytest.raises(ValueError, match=r"shard .*00000.tar is missing, but had \d+ when it was indexed"):
        open_index(source)


def test_a_source_whose_samples_are_all_gone_is_named(demo_data: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(demo_data / "train" / "pairs", tmp_path / "train" / "pairs"))
    samples = np.load(source / "index" / "samples.npy")
    np.save(source / "index" / "samples.npy", samples[:0])
    with pytest.raises(ValueError, match=r"pairs has no usable sample .*drop it from data.mixture"):
        open_split(tmp_path, "train", sources=["pairs"])
