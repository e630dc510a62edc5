"""The worked example of PackedBatch, made by the loader from real shards."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from support.data_files import picture, write_tar

from megatron_mm.config import DataConfig
from megatron_mm.data.batch import PackedBatch, documents_of_images
from megatron_mm.data.image_input import ImageInput
from megatron_mm.data.load.loader import Loader, RankView
from megatron_mm.data.plan.filling import Limits
from megatron_mm.data.plan.plan import Plan
from megatron_mm.data.prepare.index import prepare_index
from megatron_mm.data.sources.index import open_split
from megatron_mm.data.text.tokenizer import Tokenizer, train_tokenizer

MM1_IMAGE = ImageInput(size=8, fill=(0, 0, 0), tokens=4)


def worked_example(path: Path, image: ImageInput = MM1_IMAGE, *, length: int = 15) -> tuple[PackedBatch, Tokenizer]:
    """Load a picture of a red ball and a text about the sky, by default in a sequence of 15 tokens with images of 4."""
    documents = [{"items": [{"image": "0.jpg"}, {"text": "a red ball"}]}, {"items": [{"text": "the sky"}]}]
    members = {"0.0.jpg": picture()} | {f"{n}.json": json.dumps(document).encode() for n, document in enumerate(documents)}
    write_tar(path / "train" / "documents" / "0.tar", members)
    train_tokenizer(["a red ball", "the sky"] * 50, path / "tokenizer.model", vocab_size=300)
    tokenizer = Tokenizer.open(path / "tokenizer.model", special=image.control_tokens)
    prepare_index(path)
    data = DataConfig(path=path, mixture={"documents": 1.0}, sequence_length=length, decoder="pillow", prefetch_steps=1)
    for seed in range(20):  # the order of documents is random
        plan = Plan(
            open_split(path, "train", sources=["documents"]),
            weights=[1.0],
            limits=Limits(length, 1),
            image=image,
            packing_window=2,
            seed=seed,
            global_batch_size=1,
            micro_batch_size=1,
            token_multiple=length,
        )
        if plan.batch(plan.initial_state()).sequences[0].window.sample.tolist() == [0, 1]:
            break
    view = RankView(data_rank=0, data_size=1, tensor_rank=0, tensor_size=1, needs_text=True, needs_pixels=True)
    loader = Loader(
        plan,
        tokenizer=tokenizer,
        data=data,
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
    assert batch.image_documents.tolist() == [[0, 9]]
    assert batch.pixels is not None and batch.pixels.shape == (1, 3, 8, 8)
    assert (batch.num_tokens, batch.num_images) == (15, 1)


def test_on_a_device_all_but_the_image_indices_move(tmp_path: Path) -> None:
    batch, _ = worked_example(tmp_path)
    moved = batch.to(torch.device("meta"))
    on_cpu = {name for name in PackedBatch.__dataclass_fields__ if getattr(getattr(moved, name), "device", None) == torch.device("cpu")}
    assert on_cpu == {"image_starts", "image_owners", "image_documents"}
    assert moved.max_seqlen == 9 and moved.num_images == 1


def test_a_token_before_the_image_may_count_and_the_image_does_not(tmp_path: Path) -> None:
    """In InfiMM, an image is an end-of-chunk token, which is supervised, and one image token, which is not."""
    image = ImageInput(size=8, fill=(0, 0, 0), tokens=1, before=("<|endofchunk|>",), learn_before=True)
    batch, tokenizer = worked_example(tmp_path, image, length=13)
    bos, eos, chunk, place = tokenizer.bos_id, tokenizer.eos_id, tokenizer.special_id("<|endofchunk|>"), tokenizer.image_id
    a, red, ball = tokenizer.encode("a red ball")
    assert batch.token_ids[:7].tolist() == [bos, chunk, place, a, red, ball, eos]
    assert batch.loss_mask[:7].tolist() == [1, 0, 1, 1, 1, 1, 0]
    assert batch.labels[:7].tolist() == [chunk, tokenizer.pad_id, a, red, ball, eos, tokenizer.pad_id]
    assert batch.image_starts.tolist() == [2] and batch.image_documents.tolist() == [[0, 7]]


def test_tokens_around_the_features_do_not_count_unless_they_are_to(tmp_path: Path) -> None:
    """Mono-InternVL: features between two markers."""
    image = ImageInput(size=8, fill=(0, 0, 0), tokens=3, token="<IMG_CONTEXT>", before=("<img>",), after=("</img>",))
    batch, tokenizer = worked_example(tmp_path, image, length=15)
    begin, end, place = (tokenizer.special_id(name) for name in ("<img>", "</img>", "<IMG_CONTEXT>"))
    a, red, ball = tokenizer.encode("a red ball")
    assert batch.token_ids[:10].tolist() == [tokenizer.bos_id, begin, place, place, place, end, a, red, ball, tokenizer.eos_id]
    assert batch.loss_mask[:10].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 0]
    assert batch.image_starts.tolist() == [2] and batch.image_documents.tolist() == [[0, 10]]


def test_documents_of_images() -> None:
    """Including images at the first and last token of a document, several images in one document, and no images."""
    cu_seqlens = torch.tensor([0, 9, 13, 15], dtype=torch.int32)
    found = documents_of_images(torch.tensor([0, 1, 8, 9, 13, 14]), cu_seqlens=cu_seqlens)
    assert found.tolist() == [[0, 9]] * 3 + [[9, 13]] + [[13, 15]] * 2
    assert documents_of_images(torch.tensor([], dtype=torch.int64), cu_seqlens=cu_seqlens).shape == (0, 2)
