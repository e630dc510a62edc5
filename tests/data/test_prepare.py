"""`prepare index` and `prepare tokenizer`: good samples are indexed, bad ones are rejected with a reason, and none stops the command."""

from __future__ import annotations

import json
import multiprocessing
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.data_files import bomb, picture, write_tar

from megatron_mm.data.prepare.find import find_sources
from megatron_mm.data.prepare.index import IndexOptions, prepare_index
from megatron_mm.data.prepare.kinds import detect_kind
from megatron_mm.data.prepare.samples import check_image
from megatron_mm.data.prepare.tokenizer import prepare_tokenizer
from megatron_mm.data.sources.index import open_index
from megatron_mm.data.text.documents import read_items
from megatron_mm.data.text.items import ImageReference, Text
from megatron_mm.data.text.tokenizer import Tokenizer

LENIENT = IndexOptions(max_rejected=1, max_dropped_images=1)
"""Options that index the rest however much is lost."""


@pytest.fixture
def tokenizer(demo_data: Path) -> Path:
    return demo_data / "tokenizer.model"


def test_a_conversation_beside_its_only_image(tmp_path: Path, tokenizer: Path) -> None:
    """Shards as Megatron-LM's example and energon's users write them: only the list of turns, or a record that still has LLaVA's path."""
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a red circle"}]
    record = {"id": "1", "image": "00453/004539375.jpg", "conversations": turns}
    shard = {"a.jpg": picture(size=(9, 8)), "a.json": json.dumps(turns).encode(), "b.png": picture(form="PNG")}
    shard |= {"b.json": json.dumps(record).encode(), "c.json": json.dumps(turns).encode()}
    two = {"d.0.jpg": picture(), "d.1.jpg": picture(), "d.json": json.dumps(record).encode()}
    write_tar(tmp_path / "chat" / "0.tar", {**shard, **two})
    prepare_index(tmp_path, tokenizer=tokenizer, options=LENIENT)
    index = open_index(tmp_path / "chat")
    assert index.kind == "conversations" and index.rejected == {"no image file": 1, "image is not in the shard": 1}
    assert index.image_sizes(slice(0, 2)).widths.tolist() == [9, 20]
    assert [type(item) for item in read_items(index, 0)] == [ImageReference, Text, Text]


def test_every_kind_of_bad_pair_is_rejected_by_its_reason(tmp_path: Path, tokenizer: Path) -> None:
    good = {"000.jpg": picture(), "000.txt": b"a red circle", "001.png": picture(form="PNG"), "001.json": b'{"caption": "two squares"}'}
    special = {
        **{"002.jpg": picture("CMYK"), "002.txt": b"cmyk", "003.png": picture("I;16", form="PNG"), "003.txt": b"sixteen bits"},
        **{"004.webp": picture(form="WEBP"), "004.txt": b"webp", "005.png": picture("RGBA", form="PNG"), "005.txt": b"transparent"},
    }
    bad = {
        **{"006.jpg": picture()[:-100], "006.txt": b"truncated"},
        **{"007.png": bomb(9000), "007.txt": b"large", "015.png": bomb(60000), "015.txt": b"bomb"},
        **{"008.jpg": b"no image at all", "008.txt": b"text"},
        **{"009.jpg": picture(), "009.json": b'{"caption": '},
        **{"010.jpg": picture(), "010.json": b'{"url": "x"}'},
        **{"011.txt": b"without image"},
        **{"012.jpg": picture()},
        **{"013.jpg": picture(), "013.txt": b"\xff\xfe"},
        **{"014.jpg": picture(), "014.txt": b"  \n"},
    }
    write_tar(tmp_path / "pairs" / "0.tar", {**good, **special, **bad})
    prepare_index(tmp_path, tokenizer=tokenizer, options=LENIENT)
    index = open_index(tmp_path / "pairs")
    assert index.kind == "pairs" and len(index) == 6
    assert index.rejected == {
        "image does not decode": 2,
        "image larger than 64 megapixels": 2,
        "malformed JSON": 1,
        "JSON has no text or caption": 1,
        "no image file": 1,
        "no text file": 1,
        "text is not UTF-8": 1,
        "no text": 1,
    }
    images = index.item_rows[index.item_rows["is_image"] == 1]
    assert {(int(row["width"]), int(row["height"])) for row in images} == {(20, 30)}


@pytest.mark.parametrize(
    ("document", "order"),
    [
        ({"items": [{"text": "one"}, {"image": "0.jpg"}, {"text": "two"}, {"image": "1.png"}]}, [0, 1, 0, 1]),
        ({"texts": ["one", None, "two", None], "images": [None, "0.jpg", None, "1.png"]}, [0, 1, 0, 1]),
        (
            {
                "text_list": ["one", "two"],
                "image_info": [{"image_name": "1.png", "matched_text_index": 1}, {"image_name": "0.jpg", "matched_text_index": 0}],
            },
            [1, 0, 1, 0],
        ),
    ],
    ids=["items", "obelics", "mmc4"],
)
def test_interleaved_documents_keep_their_order(tmp_path: Path, tokenizer: Path, document: dict[str, Any], order: list[int]) -> None:
    members = {"a.0.jpg": picture(), "a.1.png": picture(form="PNG", size=(7, 9)), "a.json": json.dumps(document).encode()}
    write_tar(tmp_path / "interleaved" / "0.tar", members)
    prepare_index(tmp_path, tokenizer=tokenizer, options=LENIENT)
    index = open_index(tmp_path / "interleaved")
    assert index.kind == "interleaved"
    assert index.item_rows["is_image"].tolist() == order
    assert index.item_rows[index.item_rows["is_image"] == 1]["width"].tolist() == [20, 7]


def test_the_first_images_that_documents_lose_are_named(tmp_path: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture) -> None:
    document = json.dumps({"items": [{"text": "fine"}, {"image": "0.jpg"}, {"image": "1.jpg"}]}).encode()
    members = {f"{n}.{e}": d for n in range(5) for e, d in (("0.jpg", picture()), ("1.jpg", picture()[:-100]), ("json", document))}
    write_tar(tmp_path / "interleaved" / "0.tar", members)
    prepare_index(tmp_path, tokenizer=tokenizer, options=LENIENT)
    named = [line for line in caplog.messages if line.startswith("dropped from ")]
    shard = tmp_path / "interleaved" / "0.tar"
    assert named == [f"dropped from {shard}: {n}: image 1.jpg: image does not decode" for n in range(3)]


def test_a_missing_image_is_dropped_and_a_malformed_list_rejected(tmp_path: Path, tokenizer: Path) -> None:
    documents = [
        {"items": [{"text": "fine"}, {"image": "0.jpg"}]},
        {"items": [{"text": "gone"}, {"image": "9.jpg"}]},
        {"items": ["not an object"]},
        {"texts": ["one"], "images": []},
        {"nothing": 1},
    ]
    members = {}
    for number, document in enumerate(documents):
        members[f"{number}.0.jpg"] = picture()
        members[f"{number}.json"] = json.dumps(document).encode()
    write_tar(tmp_path / "interleaved" / "0.tar", members)
    prepare_index(tmp_path, tokenizer=tokenizer, options=LENIENT)
    index = open_index(tmp_path / "interleaved")
    assert index.rejected == {"JSON has no items, texts or text_list": 1, "malformed items list": 1, "malformed texts list": 1}
    assert index.item_rows["is_image"].tolist() == [0, 1, 0], "the second document keeps its text"
    assert json.loads((tmp_path / "interleaved" / "index" / "meta.json").read_text())["dropped"] == {"image is not in the shard": 1}


@pytest.mark.parametrize("cut", [700, 1000, 2048 + 1])
def test_a_broken_tar_is_named_and_its_good_samples_are_used(
    tmp_path: Path, tokenizer: Path, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    members = {f"{n}.{e}": d for n in range(4) for e, d in (("jpg", picture()), ("txt", b"a red circle"))}
    path = tmp_path / "pairs" / "0.tar"
    write_tar(path, members)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 512 * 512 - 8192 - cut])
    prepare_index(tmp_path, tokenizer=tokenizer, options=LENIENT)
    index = open_index(tmp_path / "pairs")
    assert index.rejected.get("broken shard") == 1
    assert 1 <= len(index) < 4
    assert str(path) in caplog.text


def test_the_number_of_workers_does_not_change_the_index(demo_data: Path, tmp_path: Path, tokenizer: Path) -> None:
    for number in range(3):
        members = {f"{n}.{e}": d for n in range(5) for e, d in (("jpg", picture(size=(9, 9 + n + number))), ("txt", b"a circle"))}
        write_tar(tmp_path / "pairs" / f"{number}.tar", members)
    prepare_index(tmp_path, tokenizer=tokenizer, workers=1)
    files = [tmp_path / "pairs" / "index" / "meta.json", *sorted((tmp_path / "pairs" / "index").glob("arrays-*/*.npy"))]
    one = [file.read_bytes() for file in files]
    assert len(one) == 6
    prepare_index(tmp_path, tokenizer=tokenizer, workers=2)
    assert [file.read_bytes() for file in files] == one
    samples = open_index(tmp_path / "pairs").sample_rows
    assert samples["shard"].tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert samples["first_item"].tolist() == list(range(0, 30, 2)), "rows of all shards follow one another"


def test_paths_without_data_are_named(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist"):
        prepare_index(tmp_path / "nowhere", tokenizer=tokenizer)
    with pytest.raises(ValueError, match=f"{tmp_path} contains no .tar or .jsonl shards"):
        prepare_index(tmp_path, tokenizer=tokenizer, options=LENIENT)
    write_tar(tmp_path / "pairs" / "0.tar", {"0.jpg": picture(), "0.txt": b"x"})
    with pytest.raises(ValueError, match=r"no tokenizer"):
        prepare_index(tmp_path)


def test_a_worker_that_dies_is_an_error_and_no_hang(tmp_path: Path, tokenizer: Path) -> None:
    write_tar(tmp_path / "pairs" / "0.tar", {"0.jpg": picture(), "0.txt": b"x"})
    write_tar(tmp_path / "pairs" / "1.tar", {"1.jpg": picture(), "1.txt": b"x"})

    before = set(multiprocessing.active_children())

    def kill_a_worker() -> None:
        while not (workers := set(multiprocessing.active_children()) - before):
            time.sleep(0.02)
        workers.pop().kill()

    killer = threading.Thread(target=kill_a_worker, daemon=True)
    killer.start()
    with pytest.raises(ValueError, match=r"a process that indexed .*pairs was killed: use fewer than 2 --workers"):
        prepare_index(tmp_path, tokenizer=tokenizer, workers=2)
    killer.join()
    assert not (tmp_path / "pairs" / "index" / "meta.json").exists(), (
        "rows of whole shards stay for the next attempt, and there is no index"
    )


def test_a_source_without_a_usable_sample_is_named(tmp_path: Path, tokenizer: Path) -> None:
    write_tar(tmp_path / "pairs" / "0.tar", {"0.jpg": b"no image", "0.txt": b"x"})
    with pytest.raises(ValueError, match=r"source .*pairs has no usable sample \(rejected: image does not decode: 1\)"):
        prepare_index(tmp_path, tokenizer=tokenizer, options=LENIENT)
    write_tar(tmp_path / "pairs" / "0.tar", {})
    with pytest.raises(ValueError, match=r"source .*pairs has no usable sample \(it is empty\)"):
        prepare_index(tmp_path, tokenizer=tokenizer, options=LENIENT)


def test_a_list_of_objects_in_a_jsonl_and_a_folder_without_shards(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.json").write_text('{"text": "a red circle"}')
    (tmp_path / "README.txt").write_text("notes")
    with pytest.raises(ValueError, match=r"contains no .tar or .jsonl shards.*; text/a.json can be made into shards"):
        prepare_index(tmp_path, tokenizer=tokenizer)
    (tmp_path / "text" / "0.jsonl").write_text('[{"text": "a red circle"}]')
    with pytest.raises(ValueError, match=r"\(rejected: JSON is not an object: 1\).*`megatron-mm prepare text` and `llava` convert a list"):
        prepare_index(tmp_path, tokenizer=tokenizer)


def test_texts_of_every_form_are_indexed_with_their_tokens(tmp_path: Path, tokenizer: Path) -> None:
    texts = ["a red circle", "{braces} at the beginning", "two blue squares above"]
    lines = [json.dumps({"text": text}) for text in texts] + ["no JSON", '["a list"]', '{"text": "\\ud800"}']
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "0.jsonl").write_text("\n".join(lines))
    write_tar(tmp_path / "files" / "0.tar", {f"{n}.txt": text.encode() for n, text in enumerate(texts)})
    prepare_index(tmp_path, tokenizer=tokenizer, options=LENIENT)
    expected = [len(Tokenizer.open(tokenizer).encode(text)) for text in texts]
    for name in ("lines", "files"):
        index = open_index(tmp_path / name)
        assert index.kind == "text" and index.sample_rows["text_tokens"].tolist() == expected
    assert open_index(tmp_path / "files").rejected == {}
    assert open_index(tmp_path / "lines").rejected == {"JSON is not an object": 1, "malformed JSON": 1, "text is not UTF-8": 1}


def test_the_summary_counts_and_names(tmp_path: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = {f"{n}.{extension}": data for n in range(6) for extension, data in (("jpg", picture()), ("txt", b"" if n else b"a circle"))}
    write_tar(tmp_path / "train" / "pairs" / "0.tar", members)
    summary = prepare_index(tmp_path, tokenizer=tokenizer, options=LENIENT)
    found = summary.sources["train/pairs"]
    assert (found.samples, found.images, found.rejected) == (1, 1, {"no text": 5})
    assert "no text: 5" in str(summary)
    assert [record.message.rpartition("0.tar: ")[2] for record in caplog.records if record.levelname == "WARNING"] == [
        "1: no text",
        "2: no text",
        "3: no text",
    ]


@pytest.mark.parametrize(
    ("members", "kind"),
    [
        (["a.jpg", "a.txt"], "pairs"),
        (["a.json", "a.png"], "pairs"),
        (["a.0.jpg", "a.json"], "interleaved"),
        (["a.txt"], "text"),
        (["a.json"], "interleaved"),  # a list without an image
        (["a.cls", "a.json"], "interleaved"),
    ],
)
def test_the_kind_is_that_of_the_first_sample(tmp_path: Path, members: list[str], kind: str) -> None:
    broken = tmp_path / "0.tar"
    broken.write_bytes(b"x" * 100)
    shard = write_tar(tmp_path / "1.tar", dict.fromkeys(members, b'{"items": [{"text": "x"}]}'))
    assert detect_kind([broken, shard]).kind == kind


@pytest.mark.parametrize(
    ("document", "kind"),
    [
        ({"conversations": [], "image": "jpg"}, "conversations"),
        ({"task": "caption", "answer": "x", "image": "jpg"}, "tasks"),
        ({"task": "another", "caption": "x"}, "pairs"),
        ({"conversations": "a word", "caption": "x"}, "pairs"),
    ],
)
def test_conversations_and_tasks_are_known_by_their_fields(tmp_path: Path, document: dict[str, Any], kind: str) -> None:
    """Also if the picture is next to the document, as in a pair."""
    shard = write_tar(tmp_path / "0.tar", {"0.jpg": picture(), "0.json": json.dumps(document).encode()})
    assert detect_kind([shard]).kind == kind
    (tmp_path / "0.jsonl").write_text("\n" + json.dumps(document))
    assert detect_kind([tmp_path / "0.jsonl"]).kind == (kind if kind != "pairs" else "text")


def test_sources_are_found_below_a_data_set_a_split_or_as_the_path(tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "heldout/a"):
        write_tar(tmp_path / name / "0.tar", {"0.txt": b"x"})
    assert {path.relative_to(tmp_path.resolve()).as_posix() for path in find_sources(tmp_path)} == {"train/a", "train/b", "heldout/a"}
    assert [path.name for path in find_sources(tmp_path / "train")] == ["a", "b"]
    assert find_sources(tmp_path / "train" / "a") == [tmp_path / "train" / "a"]


def test_a_tokenizer_is_trained_on_training_texts_alone(tmp_path: Path) -> None:
    for split, word in (("train", "apple"), ("heldout", "zebra")):
        members = {f"{n}.txt": f"the {word} number {n}".encode() for n in range(60)}
        write_tar(tmp_path / split / "text" / "0.tar", {**members, "bad.txt": b"\xff"})
    line = prepare_tokenizer(tmp_path, out=tmp_path / "tokenizer.model", vocab_size=300)
    tokenizer = Tokenizer.open(tmp_path / "tokenizer.model")
    assert f"{tokenizer.vocab_size} tokens, fingerprint {tokenizer.fingerprint}" in line
    assert len(tokenizer.encode("apple")) < len(tokenizer.encode("zebra"))


def test_texts_too_few_for_the_vocabulary_are_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(tmp_path / "train" / "text" / "0.tar", {f"{n}.txt": f"the apple number {n}".encode() for n in range(60)})
    prepare_tokenizer(tmp_path, out=tmp_path / "tokenizer.model", vocab_size=1000)
    assert "are enough for only " in caplog.text and "of the 1,000 tokens of --vocab-size" in caplog.text
    caplog.clear()
    prepare_tokenizer(tmp_path, out=tmp_path / "small.model", vocab_size=300)
    assert not caplog.text


def test_a_tokenizer_is_not_replaced_by_another_unless_that_is_wanted(tmp_path: Path) -> None:
    write_tar(tmp_path / "train" / "text" / "0.tar", {f"{n}.txt": f"the apple number {n}".encode() for n in range(60)})
    out = tmp_path / "tokenizer.model"
    prepare_tokenizer(tmp_path, out=out, vocab_size=300)
    prepare_index(tmp_path)
    first = out.read_bytes()
    prepare_tokenizer(tmp_path, out=out, vocab_size=300)
    with pytest.raises(ValueError, match=r"tokenizer.model is another tokenizer, with which train/text was indexed: choose another --out"):
        prepare_tokenizer(tmp_path, out=out, vocab_size=310)
    assert out.read_bytes() == first and len(list(tmp_path.iterdir())) == 2
    prepare_tokenizer(tmp_path, out=out, vocab_size=310, overwrite=True)
    assert out.read_bytes() != first


def test_another_chat_template_or_caption_prompt_than_before_is_mentioned(
    demo_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    talk = {"conversations": [{"from": "human", "value": "what shape?"}, {"from": "gpt", "value": "a cross"}]}
    write_tar(tmp_path / "train" / "talks" / "0.tar", {"0.json": json.dumps(talk).encode()})
    write_tar(tmp_path / "train" / "pairs" / "0.tar", {"0.jpg": picture(), "0.txt": b"a cross"})
    tokenizer = demo_data / "tokenizer.model"
    for _ in range(2):
        prepare_index(tmp_path, tokenizer=tokenizer, template="vicuna", caption_prompt="what is it?")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    prepare_index(tmp_path, tokenizer=tokenizer)
    warned = sorted(record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert (
        len(warned) == 2 and "pairs was indexed with --caption-prompt 'what is it?', and this index with no --caption-prompt" in warned[0]
    )
    assert "talks was indexed with --chat-template vicuna, and this index with --chat-template plain replaces it" in warned[1]
    assert warned[1].endswith("add --chat-template vicuna to keep it")


@pytest.mark.parametrize(
    ("damage", "used"),
    [
        (lambda data: data[: 5 * 1024 + 515], "the samples before its end are used, except the last"),
        (lambda data: data[:2048] + bytes([255]) * 512 + data[2560:], "the samples before and after the damage are used, except the one"),
    ],
)
def test_the_log_says_which_samples_of_a_damaged_shard_are_used(
    demo_data: Path, tmp_path: Path, damage: Callable[[bytes], bytes], used: str, caplog: pytest.LogCaptureFixture
) -> None:
    shard = write_tar(tmp_path / "a" / "0.tar", {f"{n}.txt": b"a text" for n in range(6)})
    shard.write_bytes(damage(shard.read_bytes()))
    lost = IndexOptions(kind="text", max_rejected=1)
    prepare_index(tmp_path, tokenizer=demo_data / "tokenizer.model", options=lost)
    assert used in caplog.text and len(open_index(tmp_path / "a")) == 4


def test_an_image_is_decoded_to_its_end() -> None:
    assert check_image(picture(size=(33, 44))) == (33, 44)
    for data in (picture()[:-30], picture(form="PNG")[:-30], picture(form="WEBP")[:-30], b""):
        with pytest.raises(ValueError, match="image does not decode"):
            check_image(data)
