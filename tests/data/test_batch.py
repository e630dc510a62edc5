"""The worked example of PackedBatch, made by the loader from real shards."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from data_files import picture, write_tar

from megatron_mm.config import DataConfig
from megatron_mm.data.batch import PackedBatch
from megatron_mm.data.index import open_split
from megatron_mm.data.loader import Loader, RankView
from megatron_mm.data.plan import Plan
from megatron_mm.data.prepare import prepare_index
from megatron_mm.data.tokenizer import Tokenizer, train_tokenizer


def worked_example(path: Path) -> tuple[PackedBatch, Tokenizer]:
    """A picture of a red ball and a text about the sky, in a sequence of 15 tokens with images of 4."""
    documents = [{"items": [{"image": "0.jpg"}, {"text": "a red ball"}]}, {"items": [{"text": "the sky"}]}]
    members = {"0.0.jpg": picture()} | {f"{n}.json": json.dumps(document).encode() for n, document in enumerate(documents)}
    write_tar(path / "train" / "documents" / "0.tar", members)
    tokenizer = train_tokenizer(["a red ball", "the sky"] * 50, path / "tokenizer.model", vocab_size=300)
    prepare_index(path)
    data = DataConfig(path=path, mixture={"documents": 1.0}, sequence_length=15, decoder="pillow", prefetch_steps=1)
    for seed in range(20):  # the order of documents is random
        plan = Plan(
            open_split(path, "train", sources=["documents"]),
            weights=[1.0],
            sequence_length=15,
            max_images=1,
            packing_window=2,
            tokens_per_image=4,
            seed=seed,
            global_batch_size=1,
            micro_batch_size=1,
        )
        if plan.batch(plan.initial_state()).sequences[0].window.sample.tolist() == [0, 1]:
            break
    view = RankView(data_rank=0, data_size=1, tensor_rank=0, tensor_size=1, needs_text=True, needs_pixels=True)
    loader = Loader(
        plan,
        tokenizer=tokenizer,
        data=data,
        image_size=8,
        fill=(0, 0, 0),
        view=view,
        start=plan.initial_state(),
        device=torch.device("cpu"),
    )
    try:
        return next(loader).micro_batches[0], tokenizer
    finally:
        loader.close()


def test_the_worked_example(tmp_path: Path) -> None:
    batch, tokenizer = worked_example(tmp_path)
    bos, eos, image, pad = tokenizer.bos_id, tokenizer.eos_id, tokenizer.image_id, tokenizer.pad_id
    a, red, ball = tokenizer.encode("a red ball")
    the, sky = tokenizer.encode("the sky")
    assert batch.token_ids.tolist() == [bos, image, image, image, image, a, red, ball, eos, bos, the, sky, eos, pad, pad]
    assert batch.labels.tolist() == [pad, pad, pad, pad, a, red, ball, eos, pad, the, sky, eos, pad, pad, pad]
    assert batch.loss_mask.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 9, 13, 15] and batch.max_seqlen == 9
    assert batch.position_ids.tolist() == [*range(9), *range(4), *range(2)]
    assert batch.is_token.tolist() == [True] * 13 + [False] * 2
    assert batch.source_ids.tolist() == [0] * 15
    assert batch.image_starts.tolist() == [1] and batch.image_owners.tolist() == [0]
    assert batch.pixels is not None and batch.pixels.shape == (1, 3, 8, 8)
    assert (batch.num_tokens, batch.num_images) == (15, 1)


def test_on_a_device_all_but_the_image_indices_move(tmp_path: Path) -> None:
    batch, _ = worked_example(tmp_path)
    moved = batch.to(torch.device("meta"))
    on_cpu = {name for name in PackedBatch.__dataclass_fields__ if getattr(getattr(moved, name), "device", None) == torch.device("cpu")}
    assert on_cpu == {"image_starts", "image_owners"}
    assert moved.max_seqlen == 9 and moved.num_images == 1
