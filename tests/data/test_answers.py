"""Samples in which only the answers are supervised, from shards to PackedBatch."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chats import CONVERSATIONS, write_conversations
from support.data_files import ALONE, experiment, picture, rot, write_tar

from megatron_mm.config import Experiment
from megatron_mm.data.batch import PackedBatch
from megatron_mm.data.image_input import ImageInput
from megatron_mm.data.plan.packing import supervised_tokens
from megatron_mm.data.prepare.index import IndexOptions, prepare_index
from megatron_mm.data.sources.index import open_index
from megatron_mm.data.text.chat import CHAT_TEMPLATES, chat_template
from megatron_mm.data.text.tokenizer import Tokenizer
from megatron_mm.evaluation.captions import caption_tasks
from megatron_mm.families.recipes import get_recipe
from megatron_mm.parallel.topology import Topology
from megatron_mm.run.data import TrainingData, make_plan, open_tokenizer

LENIENT = IndexOptions(max_rejected=1)


def chat_experiment(path: Path, *, sequences: int = 4, **data: Any) -> Experiment:
    """Return an experiment whose packing window is one epoch of the three conversations, with one micro-batch of `sequences` sequences."""
    settings = experiment(path, **{"mixture": {"chat": 1.0}, **data})
    train = replace(settings.train, global_batch_size=sequences, micro_batch_size=sequences)
    return replace(settings, train=train, data=replace(settings.data, packing_window=3))


def load(path: Path, topology: Topology = ALONE, *, sequences: int = 4, **data: Any) -> PackedBatch:
    loader = TrainingData(chat_experiment(path, sequences=sequences, **data), topology, Tokenizer.open(path / "tokenizer.model"))
    try:
        return next(loader).micro_batches[0]
    finally:
        loader.close()


def answers_of(batch: PackedBatch, tokenizer: Tokenizer) -> set[tuple[str, ...]]:
    """Return, for each document, the supervised texts (one per run of labels); <E> marks a supervised end of the document."""
    found = set()
    for begin, end in itertools.pairwise(batch.cu_seqlens.tolist()):
        runs: list[list[int]] = []
        for place in range(begin, end):
            if batch.loss_mask[place]:
                if place == begin or not batch.loss_mask[place - 1]:
                    runs.append([])
                runs[-1].append(int(batch.labels[place]))
        texts = [tokenizer.decode(run) + "<E>" * (run[-1] == tokenizer.eos_id and place == end - 1) for run in runs]
        if batch.is_token[begin]:
            found.add(tuple(texts))
    return found


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_the_answers_count_and_nothing_else(tmp_path: Path, name: str) -> None:
    path = write_conversations(tmp_path)
    prepare_index(path, template=name)
    index = open_index(path / "train" / "chat")
    assert index.kind == "conversations" and index.chat_template == name and len(index) == 3 and not index.rejected
    tokenizer = Tokenizer.open(path / "tokenizer.model")
    batch = load(path, sequence_length=1024)
    expected = {tuple(values[1::2]) for values in CONVERSATIONS}
    assert {tuple(text.removesuffix("<E>").strip() for text in texts) for texts in answers_of(batch, tokenizer)} == expected
    counted = batch.loss_mask.bool()
    assert torch.equal(batch.labels[counted], batch.token_ids.roll(-1)[counted])
    for _, end in itertools.pairwise(batch.cu_seqlens.tolist()):
        if batch.is_token[end - 1]:
            learned = chat_template(name).supervises_eos
            assert batch.token_ids[end - 1] == tokenizer.eos_id and counted[end - 2] == learned, "where it ends the last answer, EOS counts"
            assert learned or (counted[end - 3] and batch.labels[end - 3] == tokenizer.special_id("<|im_end|>"))
    if name in ("zephyr", "vicuna", "llama2"):
        assert (batch.labels[counted] == tokenizer.eos_id).sum() == 6 * 4  # answers, epochs
    images = (batch.token_ids == tokenizer.image_id).sum()
    assert images == 16 * batch.num_images > 0


def test_a_middle_stage_knows_the_mask_from_the_plan(tmp_path: Path) -> None:
    path = write_conversations(tmp_path)
    prepare_index(path, template="vicuna")
    for length in (256, 60):  # whole, and cut
        whole = load(path, sequence_length=length)
        middle = load(path, replace(ALONE, pipeline_size=3, pipeline_rank=1), sequence_length=length)
        assert middle.pixels is None and torch.equal(middle.loss_mask, whole.loss_mask) and 0 < whole.loss_mask.mean() < 0.5


def test_a_cut_conversation_counts_what_it_counts_whole(tmp_path: Path) -> None:
    """Except for the first token of each piece, which has no token before it to be predicted from."""
    path = write_conversations(tmp_path)
    prepare_index(path)
    plan = make_plan(chat_experiment(path, sequence_length=24), split="train")
    window = plan.batch(plan.initial_state()).sequences[0].window
    whole, cut = load(path, sequences=1), load(path, sequences=window.num_sequences, sequence_length=24)
    labels = [Counter(batch.labels[batch.loss_mask.bool()].tolist()) for batch in (whole, cut)]
    lost = 0
    for sample, begin in zip(window.sample.tolist(), window.begin.tolist(), strict=True):
        counted = supervised_tokens(plan.indexes[0], sample, plan.image)
        lost += bool(counted[begin])
    assert len(window.sample) > 4 and lost > 0
    assert labels[0].total() - labels[1].total() == lost and not labels[1] - labels[0]


def test_a_template_whose_control_tokens_the_tokenizer_lacks_is_refused(demo_data: Path, tmp_path: Path) -> None:
    path = write_conversations(tmp_path)
    (path / "tokenizer.model").write_bytes((demo_data / "tokenizer.model").read_bytes())
    with pytest.raises(ValueError, match=r"internlm2 needs the control tokens <\|im_start\|>, <\|im_end\|>, which .*tokenizer.model lacks"):
        prepare_index(path, template="internlm2")
    with pytest.raises(ValueError, match=r"chat template 'chatml' is unknown"):
        prepare_index(path, template="chatml")
    prepare_index(path, template="llama2")


def test_another_template_than_the_index_has_is_an_error(tmp_path: Path) -> None:
    path = write_conversations(tmp_path)
    prepare_index(path, template="vicuna")
    for name in (None, "vicuna"):
        make_plan(experiment(path, mixture={"chat": 1.0}, chat_template=name), split="train")
    with pytest.raises(ValueError, match=r"chat template vicuna, but data.chat_template is zephyr: run .* --chat-template zephyr`"):
        make_plan(experiment(path, mixture={"chat": 1.0}, chat_template="zephyr"), split="train")
    with pytest.raises(ValueError, match=r"chat template 'chatml' is unknown"):
        make_plan(experiment(path, mixture={"chat": 1.0}, chat_template="chatml"), split="train")


def test_another_caption_prompt_than_the_index_has_is_an_error(demo_data: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(demo_data, tmp_path / "data"))
    wanted = experiment(path, mixture={"pairs": 1.0}, caption_prompt="what is it?")
    with pytest.raises(
        ValueError, match=r"the caption prompt None, but data.caption_prompt is 'what is it\?': run .* --caption-prompt 'what is it\?'`"
    ):
        make_plan(wanted, split="train")
    prepare_index(path / "train" / "pairs", tokenizer=path / "tokenizer.model", caption_prompt="what is it?")
    for prompt in ("what is it?", None):
        make_plan(replace(wanted, data=replace(wanted.data, caption_prompt=prompt)), split="train")


def test_a_conversation_that_changed_costs_itself_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_conversations(tmp_path)
    prepare_index(path)
    shard = path / "train" / "chat" / "0.tar"
    rot(shard, shard.read_bytes().replace(b"a cross", b"ab3xyz!"))
    batch = load(path, max_bad_fraction=1.0)
    tokenizer = Tokenizer.open(path / "tokenizer.model")
    assert "unusable text in sample 0 of chat" in caplog.text
    texts = {text.removesuffix("<E>").strip() for found in answers_of(batch, tokenizer) for text in found}
    assert texts == {answer for values in CONVERSATIONS[1:] for answer in values[1::2]}


def test_tasks_and_lines_of_text_are_indexed_too(demo_data: Path, tmp_path: Path) -> None:
    lines = [{"conversations": [{"from": "human", "value": "one plus one?"}, {"from": "gpt", "value": "two"}]}, {"conversations": 3}]
    (tmp_path / "train" / "lines").mkdir(parents=True)
    (tmp_path / "train" / "lines" / "0.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = {"task": "vqa", "question": "what shape?", "answer": "cross", "image": "jpg"}
    write_tar(tmp_path / "train" / "tasks" / "0.tar", {"0.jpg": picture(), "0.json": json.dumps(task).encode()})
    prepare_index(tmp_path, tokenizer=demo_data / "tokenizer.model", options=LENIENT)
    found = {name: open_index(tmp_path / "train" / name) for name in ("lines", "tasks")}
    assert [index.kind for index in found.values()] == ["conversations", "tasks"]
    assert found["lines"].rejected == {"JSON has no conversations": 1}
    assert found["lines"].item_rows["counted"].tolist() == [0, 1] and found["tasks"].item_rows["counted"].tolist() == [0, 0, 1]
    tokenizer = Tokenizer.open(demo_data / "tokenizer.model")
    assert found["lines"].item_rows["tokens"].sum() == len(tokenizer.encode("one plus one?\ntwo"))


def test_the_demo_s_conversations_and_tasks_train(demo_data: Path) -> None:
    settings = experiment(demo_data, mixture={"conversations": 0.5, "tasks": 0.5}, chat_template="plain")
    tokenizer = Tokenizer.open(settings.data.tokenizer_path)
    data = TrainingData(settings, ALONE, tokenizer)
    try:
        step = next(data)
    finally:
        data.close()
    assert not step.bad
    for batch in step.micro_batches:
        assert 0.02 < batch.loss_mask.mean() < 0.4 and batch.num_images > 4


@pytest.mark.parametrize("template", ["plain", "vicuna", "internlm2"])
def test_pairs_may_be_asked_for_their_captions(tmp_path: Path, template: str) -> None:
    """The prompt is not supervised, the caption is, and generation begins after the prompt."""
    path, prompt = write_conversations(tmp_path), "what is it?"
    members = {f"{n}.{e}": d for n, text in enumerate(("a red circle", "two")) for e, d in (("jpg", picture()), ("txt", text.encode()))}
    write_tar(path / "train" / "pairs" / "0.tar", {**members, "2.jpg": picture(), "2.txt": b" "})
    tokenizer, image = Tokenizer.open(path / "tokenizer.model"), ImageInput(size=32, fill=(0, 0, 0), tokens=4)
    prepare_index(path, options=replace(LENIENT, template=template))
    plain = open_index(path / "train" / "pairs")
    assert (plain.chat_template, plain.caption_prompt, plain.answers_only) == (None, None, False)
    task = caption_tasks(plain, tokenizer, image, count=5)[0]
    assert task.prompt.ids == [tokenizer.bos_id, *[tokenizer.image_id] * 4] and task.true == "a red circle"
    prepare_index(path, options=replace(LENIENT, template=template, caption_prompt=prompt))
    index = open_index(path / "train" / "pairs")
    assert index.kind == "pairs" and (index.chat_template, index.caption_prompt, index.answers_only) == (template, prompt, True)
    assert index.rejected == plain.rejected == {"no text": 1}
    assert open_index(path / "train" / "chat").caption_prompt is None
    batch = load(path, sequence_length=1024, mixture={"pairs": 1.0})
    found = {tuple(text.removesuffix("<E>").strip() for text in texts) for texts in answers_of(batch, tokenizer)}
    assert found == {("a red circle",), ("two",)}
    task = caption_tasks(index, tokenizer, image, count=1)[0]
    assert task.true == "a red circle" and tokenizer.image_id in task.prompt.ids
    assert tokenizer.decode(task.prompt.ids).count(prompt) == 1 and "red circle" not in tokenizer.decode(task.prompt.ids)
    bounds = itertools.pairwise(batch.cu_seqlens.tolist())
    documents = [batch.token_ids[begin:end].tolist() for begin, end in bounds]
    short = [token for token in task.prompt.ids if token != tokenizer.image_id]
    assert any([token for token in ids if token != tokenizer.image_id][: len(short)] == short for ids in documents)


def test_of_a_caption_in_tiles_every_stage_knows_what_counts(demo_data: Path, tmp_path: Path) -> None:
    """In Mono-InternVL, with tiles between <img> and </img>, no token of an image or of the prompt is supervised, on any stage."""
    captions = ("a red circle", "two blue squares")
    members = {f"{n}.{e}": d for n, text in enumerate(captions) for e, d in (("jpg", picture(size=(90, 40))), ("txt", text.encode()))}
    write_tar(tmp_path / "train" / "pairs" / "0.tar", members)
    (tmp_path / "tokenizer.model").write_bytes((demo_data / "tokenizer.model").read_bytes())
    prepare_index(tmp_path, caption_prompt="what is it?")
    base = get_recipe("debug_mono_internvl")
    settings = replace(base, data=replace(base.data, path=tmp_path, decoder="pillow", packing_window=2, mixture={"pairs": 1.0}))
    tokenizer = open_tokenizer(settings)
    found = []
    for topology in (ALONE, replace(ALONE, pipeline_size=3, pipeline_rank=1)):
        data = TrainingData(settings, topology, tokenizer)
        try:
            found.append(next(data).micro_batches)
        finally:
            data.close()
    for batch, middle in zip(*found, strict=True):
        assert torch.equal(batch.loss_mask, middle.loss_mask) and middle.pixels is None
        assert batch.num_images == 3 * len(batch.image_documents.unique(dim=0)), "two tiles and a thumbnail"
    assert set().union(*(answers_of(batch, tokenizer) for batch in found[0])) == {(f"{caption}<E>",) for caption in captions}


def test_a_prompt_that_says_nothing_or_is_not_used_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_conversations(tmp_path)
    with pytest.raises(ValueError, match="the caption prompt is empty: leave out --caption-prompt"):
        prepare_index(path, caption_prompt=" ")
    with pytest.raises(ValueError, match=r"the caption prompt '<image> what is it.' has an <image> mark.*: leave it out"):
        prepare_index(path, caption_prompt="<image> what is it?")
    prepare_index(path, caption_prompt="what is it?")
    assert "has no source of pairs, so the caption prompt is not used" in caplog.text
