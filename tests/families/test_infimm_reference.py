"""The plain InfiMM reference itself: its names, its language model against transformers' Llama, and which tokens see which image."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from support.infimm_reference import (
    EVA01_G_224,
    EVA02_BIGE_224,
    EVA02_L_336,
    INFIMM_ZEPHYR,
    EvaRope,
    InfiMMReference,
    InfiMMSizes,
    TowerSizes,
)
from support.random_weights import randomize
from transformers import LlamaConfig, LlamaForCausalLM

TOWER = TowerSizes(image_size=8, patch_size=4, width=24, layers=2, heads=2, ffn=40, output=10, eva02=True, rotary_grid=4)
SMALL = InfiMMSizes(
    tower=TOWER,
    vocab=34,
    width=32,
    ffn=48,
    layers=4,
    heads=4,
    kv_heads=2,
    every=2,
    image_token=33,
    latents=3,
    resampler_layers=2,
    cross_heads=2,
    cross_head_dim=8,
)
END_OF_CHUNK, IMAGE = 32, 33
IDS = torch.tensor([1, 7, 8, END_OF_CHUNK, IMAGE, 9, 10, 11, END_OF_CHUNK, IMAGE, 12, 13])
"""Two words, an image, three words, an image, two words."""
TEXT_TIME = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2])


def make(sizes: InfiMMSizes = SMALL, *, attention_gate: float = 0.5, ff_gate: float = 0.5) -> InfiMMReference:
    """Return a model with random weights and the given values of all attention and feed-forward gates."""
    model = InfiMMReference(sizes)
    randomize(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("attn_gate"):
                parameter.fill_(attention_gate)
            if name.endswith("ff_gate"):
                parameter.fill_(ff_gate)
    return model


def make_bare(model: InfiMMReference, sizes: InfiMMSizes = SMALL) -> LlamaForCausalLM:
    """Return transformers' Llama with the weights of the model's decoder."""
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=sizes.vocab,
            hidden_size=sizes.width,
            intermediate_size=sizes.ffn,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.kv_heads,
            rms_norm_eps=sizes.rms_eps,
            rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
            tie_word_embeddings=False,
        )
    )
    state = {
        name.removeprefix("model.lang_encoder.").replace(".decoder_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if name.startswith("model.lang_encoder.") and "gated_cross_attn_layer" not in name
    }
    llama.load_state_dict(state, strict=True)
    return llama


def make_images(*seeds: int) -> torch.Tensor:
    """Return images [n, 3, 8, 8]; equal seeds make equal images."""
    shape = (3, TOWER.image_size, TOWER.image_size)
    images = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(images) if images else torch.empty(0, *shape)


@torch.no_grad()
def changed(before: torch.Tensor, after: torch.Tensor) -> list[bool]:
    """Return True for each token whose logits are not bit-identical."""
    return (before != after).any(dim=1).tolist()


@torch.no_grad()
def test_closed_gates_leave_the_language_model() -> None:
    """In fp32 against transformers' Llama, on logits of about unit scale."""
    model = make(attention_gate=0.0, ff_gate=0.0)
    expected = make_bare(model)(IDS[None]).logits[0]
    assert expected.std() > 0.5
    torch.testing.assert_close(model(IDS, make_images(1, 2)), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_document_without_images_is_the_language_model_whatever_the_gates() -> None:
    model = make()
    ids = torch.tensor([1, 7, 8, 9, 10, 11])
    torch.testing.assert_close(model(ids, make_images()), make_bare(model)(ids[None]).logits[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_open_gates_change_every_token_of_a_document_with_images() -> None:
    """Also tokens before the first image: the feed-forward part of a gated block applies to them, too."""
    model = make()
    assert all(changed(model(IDS, make_images(1, 2)), make_bare(model)(IDS[None]).logits[0]))
    attention_only = make(ff_gate=0.0)
    difference = (attention_only(IDS, make_images(1, 2)) - make_bare(attention_only)(IDS[None]).logits[0]).abs().amax(dim=1)
    assert (difference > 1e-4).tolist() == [time > 0 for time in TEXT_TIME], "no image before them, nothing attended to"


@torch.no_grad()
def test_an_image_changes_no_token_before_it() -> None:
    """Neither words nor the end-of-chunk token before it; later words also receive it through self-attention."""
    model = make()
    logits = model(IDS, make_images(1, 2))
    assert changed(logits, model(IDS, make_images(3, 2))) == [time >= 1 for time in TEXT_TIME]
    assert changed(logits, model(IDS, make_images(1, 3))) == [time >= 2 for time in TEXT_TIME]


@torch.no_grad()
def test_a_token_looks_at_the_last_image_alone() -> None:
    """Without self-attention, tokens receive images only through cross-attention, so each token depends on one image."""
    model = make()
    for layer in model.model.lang_encoder.model.layers:
        layer.decoder_layer.self_attn.o_proj.weight.zero_()
    logits = model(IDS, make_images(1, 2))
    assert changed(logits, model(IDS, make_images(3, 2))) == [time == 1 for time in TEXT_TIME]
    assert changed(logits, model(IDS, make_images(1, 3))) == [time == 2 for time in TEXT_TIME]


def test_everything_but_the_tower_learns() -> None:
    model = make()
    model(IDS, make_images(1, 2)).logsumexp(dim=1).sum().backward()
    silent = {name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    assert silent == {name for name, _ in model.named_parameters() if name.startswith("model.vision_encoder.")}


def test_image_tokens_and_images_must_match() -> None:
    with pytest.raises(AssertionError, match="2 image tokens, but 1 images"):
        make()(IDS, make_images(1))


@torch.no_grad()
def test_rotary_positions_turn_what_they_should() -> None:
    """Heads of 12 channels, 6 for rows and 6 for columns; the patch in row 1 and column 0 of a 2 x 2 grid over 4 positions."""
    rope = EvaRope(TOWER)
    x = torch.zeros(1, 1, 5, 12)
    x[..., 0] = x[..., 2] = x[..., 6] = 1.0
    turned = rope(x)[0, 0]
    assert torch.equal(turned[0], x[0, 0, 0]), "the class token"
    slow = 2 * 10000 ** (-2 / 6)
    expected = torch.tensor([torch.tensor(2.0).cos(), torch.tensor(2.0).sin(), torch.tensor(slow).cos(), torch.tensor(slow).sin()])
    torch.testing.assert_close(turned[3, :4], expected)
    assert torch.equal(turned[3, 4:], x[0, 0, 3, 4:]), "column 0 turns nothing"
    torch.testing.assert_close(turned[2, 6:8], expected[:2])


# ------------------------------------------------------------------------------------------------------------------ names


def names(prefix: str, endings: str) -> list[str]:
    """`names("a.", "b,c.*")` is a.b, a.c.weight, a.c.bias."""
    found = []
    for ending in endings.split(","):
        found += [f"{prefix}{ending[:-1]}{kind}" for kind in ("weight", "bias")] if ending.endswith(".*") else [prefix + ending]
    return found


EVA02_BLOCK = (
    "norm1.*,norm2.*,attn.q_proj.weight,attn.k_proj.weight,attn.v_proj.weight,attn.q_bias,attn.v_bias,attn.inner_attn_ln.*,attn.proj.*,"
    "mlp.w1.*,mlp.w2.*,mlp.w3.*,mlp.ffn_ln.*,attn.rope.freqs_cos,attn.rope.freqs_sin"
)
EVA01_BLOCK = "norm1.*,norm2.*,attn.qkv.weight,attn.q_bias,attn.v_bias,attn.proj.*,mlp.fc1.*,mlp.fc2.*"
DECODER_LAYER = (
    "input_layernorm.weight,post_attention_layernorm.weight,self_attn.q_proj.weight,self_attn.k_proj.weight,self_attn.v_proj.weight,"
    "self_attn.o_proj.weight,mlp.gate_proj.weight,mlp.up_proj.weight,mlp.down_proj.weight"
)
GATED_BLOCK = "attn_gate,ff_gate,attn.norm.*,attn.to_q.weight,attn.to_kv.weight,attn.to_out.weight,ff.0.*,ff.1.weight,ff.3.weight"
RESAMPLER_LAYER = "0.norm_media.*,0.norm_latents.*,0.to_q.weight,0.to_kv.weight,0.to_out.weight,1.0.*,1.1.weight,1.3.weight"


def released_names(sizes: InfiMMSizes) -> set[str]:
    tower, language = "model.vision_encoder.", "model.lang_encoder."
    rope = ",rope.freqs_cos,rope.freqs_sin" if sizes.tower.eva02 else ""
    parts = [
        names(tower, f"cls_token,pos_embed,patch_embed.proj.*,norm.*,head.*{rope}"),
        *[names(f"{tower}blocks.{i}.", EVA02_BLOCK if sizes.tower.eva02 else EVA01_BLOCK) for i in range(sizes.tower.layers)],
        names("model.perceiver.", "latents,norm.*"),
        *[names(f"model.perceiver.layers.{i}.", RESAMPLER_LAYER) for i in range(sizes.resampler_layers)],
        names(language, "model.embed_tokens.weight,model.norm.weight,lm_head.weight"),
        *[names(f"{language}model.layers.{i}.decoder_layer.", DECODER_LAYER) for i in range(sizes.layers)],
        *[
            names(f"{language}model.layers.{i}.gated_cross_attn_layer.", GATED_BLOCK)
            for i in range(sizes.layers)
            if i % sizes.every == sizes.every - 1
        ],
    ]
    return set(itertools.chain.from_iterable(parts))


VARIANTS = {
    "Zephyr, EVA02-L": INFIMM_ZEPHYR,
    "13B, EVA01-g": replace(INFIMM_ZEPHYR, tower=EVA01_G_224, width=5120, ffn=13824, layers=40, heads=40, kv_heads=40, every=4),
    "13B, EVA02-bigE": replace(INFIMM_ZEPHYR, tower=EVA02_BIGE_224, width=5120, ffn=13824, layers=40, heads=40, kv_heads=40, every=4),
}
TOWER_PARAMETERS = {EVA02_L_336: 304_432_832, EVA01_G_224: 1_012_588_928, EVA02_BIGE_224: 4_350_556_928}


@pytest.mark.parametrize("sizes", VARIANTS.values(), ids=VARIANTS.keys())
def test_names_and_shapes_are_those_of_released_checkpoints(sizes: InfiMMSizes) -> None:
    with torch.device("meta"):
        model = InfiMMReference(sizes)
    state = model.state_dict()
    assert set(state) == released_names(sizes)
    width, tower = sizes.width, sizes.tower.width
    block = f"model.lang_encoder.model.layers.{sizes.every - 1}.gated_cross_attn_layer."
    shapes = {
        "model.perceiver.latents": (64, tower),
        "model.perceiver.layers.5.0.to_q.weight": (512, tower),
        "model.perceiver.layers.5.0.to_kv.weight": (1024, tower),
        "model.perceiver.layers.5.0.to_out.weight": (tower, 512),
        "model.perceiver.layers.5.1.1.weight": (4 * tower, tower),
        "model.perceiver.layers.5.1.3.weight": (tower, 4 * tower),
        f"{block}attn_gate": (1,),
        f"{block}ff_gate": (1,),
        f"{block}attn.to_q.weight": (512, width),
        f"{block}attn.to_kv.weight": (1024, tower),
        f"{block}attn.to_out.weight": (width, 512),
        f"{block}ff.1.weight": (4 * width, width),
        f"{block}ff.3.weight": (width, 4 * width),
        "model.lang_encoder.lm_head.weight": (32002, width),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert sum(p.numel() for p in model.model.vision_encoder.parameters()) == TOWER_PARAMETERS[sizes.tower]
