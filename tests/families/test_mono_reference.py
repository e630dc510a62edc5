"""The plain Mono-InternVL reference itself: names, language model against transformers' Llama, and routing of tokens to networks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.mono_reference import MONO_INTERNVL_2B, MonoReference, MonoSizes, pixel_unshuffle
from support.random_weights import randomize
from transformers import LlamaConfig, LlamaForCausalLM

BEGIN, END, IMAGE = 37, 38, 39
SMALL = MonoSizes(
    image_size=16,
    patch_size=4,
    patch_width=6,
    vocab=40,
    width=32,
    ffn=48,
    layers=3,
    heads=4,
    kv_heads=2,
    image_token=IMAGE,
)
IDS = torch.tensor([1, 5, 6, BEGIN, *[IMAGE] * 8, END, 7, 8])
"""Two words, an image of two tiles (4 tokens each) between its marks, two words."""
IS_IMAGE = (IDS == IMAGE).tolist()
TEXT = torch.tensor([1, 5, 6, 7, 8, 9])


def make() -> MonoReference:
    model = MonoReference(SMALL)
    randomize(model)
    return model


def make_tiles(*seeds: int, size: int = SMALL.image_size) -> torch.Tensor:
    """Return tiles [k, 3, size, size]; equal seeds make equal tiles."""
    tiles = [torch.randn(3, size, size, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(tiles) if tiles else torch.empty(0, 3, size, size)


def make_bare(model: MonoReference) -> LlamaForCausalLM:
    """Return transformers' Llama with the weights of the model's text part."""
    head_dim, queries = SMALL.width // SMALL.heads, SMALL.heads // SMALL.kv_heads
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=SMALL.vocab,
            hidden_size=SMALL.width,
            intermediate_size=SMALL.ffn,
            num_hidden_layers=SMALL.layers,
            num_attention_heads=SMALL.heads,
            num_key_value_heads=SMALL.kv_heads,
            rms_norm_eps=SMALL.rms_eps,
            rope_parameters={"rope_type": "default", "rope_theta": SMALL.rope_theta},
            tie_word_embeddings=False,
        )
    )
    theirs = model.language_model.state_dict()
    ours = {"model.embed_tokens.weight": theirs["model.tok_embeddings.weight"], "lm_head.weight": theirs["output.weight"]}
    ours["model.norm.weight"] = theirs["model.norm.weight"]
    for layer in range(SMALL.layers):
        name = f"model.layers.{layer}."
        blocks = theirs[f"{name}attention.wqkv.weight"].split(head_dim)  # q0 q1 k0 v0 q2 q3 k1 v1
        kinds = (["q"] * queries + ["k", "v"]) * SMALL.kv_heads
        for kind in "qkv":
            ours[f"{name}self_attn.{kind}_proj.weight"] = torch.cat([b for b, k in zip(blocks, kinds, strict=True) if k == kind])
        ours[f"{name}self_attn.o_proj.weight"] = theirs[f"{name}attention.wo.weight"]
        for hf, released in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            ours[f"{name}mlp.{hf}_proj.weight"] = theirs[f"{name}feed_forward.{released}.weight"]
        ours[f"{name}input_layernorm.weight"] = theirs[f"{name}attention_norm.weight"]
        ours[f"{name}post_attention_layernorm.weight"] = theirs[f"{name}ffn_norm.weight"]
    llama.load_state_dict(ours, strict=True)
    return llama


def changed(before: torch.Tensor, after: torch.Tensor) -> list[bool]:
    """Return True for each token whose logits are not bit-identical."""
    return (before != after).any(dim=1).tolist()


@torch.no_grad()
def test_text_alone_is_the_language_model() -> None:
    """In fp32 against transformers' Llama, on logits of about unit scale."""
    model = make()
    expected = make_bare(model)(TEXT[None]).logits[0]
    assert expected.std() > 0.5
    torch.testing.assert_close(model(TEXT, make_tiles()), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_with_equal_networks_images_are_embeddings_like_others() -> None:
    """As at the start of training, when both networks are equal: the model is Llama on embeddings that include image features."""
    model = make()
    for layer in model.language_model.model.layers:
        layer.feed_forward_ve.load_state_dict(layer.feed_forward.state_dict())
    llama, tiles = make_bare(model), make_tiles(1, 2)
    embeddings = llama.model.embed_tokens(IDS)
    embeddings[IDS == IMAGE] = model.encode(tiles).flatten(0, 1)
    expected = llama(inputs_embeds=embeddings[None]).logits[0]
    torch.testing.assert_close(model(IDS, tiles), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("network", ["feed_forward", "feed_forward_ve"])
def test_each_network_has_its_own_tokens(network: str) -> None:
    """Without attention, a token depends only on its own network; the markers around an image are text."""
    model, tiles = make(), make_tiles(1, 2)
    for layer in model.language_model.model.layers:
        layer.attention.wo.weight.zero_()
    before = model(IDS, tiles)
    getattr(model.language_model.model.layers[1], network).w2.weight.mul_(1.5)
    assert changed(before, model(IDS, tiles)) == [image == (network == "feed_forward_ve") for image in IS_IMAGE]


@torch.no_grad()
def test_attention_is_causal_and_tiles_are_in_order() -> None:
    model = make()
    before = model(IDS, make_tiles(1, 2))
    assert changed(before, model(IDS, make_tiles(3, 2))) == [place >= 4 for place in range(len(IDS))]
    assert changed(before, model(IDS, make_tiles(1, 3))) == [place >= 8 for place in range(len(IDS))], "image tokens too"


@torch.no_grad()
def test_the_class_slot_is_carried_and_unused() -> None:
    model, tiles = make(), make_tiles(1, 2)
    before = model(IDS, tiles)
    embeddings = model.vision_model.embeddings
    embeddings.class_embedding.fill_(float("nan"))
    embeddings.position_embedding[:, 0] = float("nan")
    assert not any(changed(before, model(IDS, tiles)))


@torch.no_grad()
def test_patches_have_the_positions_of_their_places() -> None:
    """For zero pixels, the patch in row r and column c of 4 x 4 is the bias plus row 1 + 4 r + c of the table."""
    embeddings = make().vision_model.embeddings
    patches = embeddings(torch.zeros(1, 3, 16, 16))
    torch.testing.assert_close(patches[0, 1, 2], embeddings.patch_embedding.bias + embeddings.position_embedding[0, 1 + 4 + 2])


@torch.no_grad()
def test_positions_stretch_to_other_tile_sizes() -> None:
    """For tiles of twice the size, column 3 of 8 is at 1.25 of 4: a cubic convolution of four neighbours, with torch's a = -0.75."""
    embeddings = make().vision_model.embeddings
    embeddings.patch_embedding.weight.zero_()
    embeddings.patch_embedding.bias.zero_()
    columns = torch.tensor([3.0, -1.0, 4.0, 1.5])
    embeddings.position_embedding[:, 1:] = columns.repeat(4)[None, :, None]

    def near(t: float) -> float:
        return 1.25 * t**3 - 2.25 * t**2 + 1

    def far(t: float) -> float:
        return -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)

    patches = embeddings(make_tiles(1, size=32))
    assert patches.shape == (1, 8, 8, 6)
    expected = torch.tensor([far(1.25), near(0.25), near(0.75), far(1.75)]) @ columns
    torch.testing.assert_close(patches[0, :, 3], expected.expand(8, 6))


def test_pixel_unshuffle() -> None:
    """The worked example of its docstring; and, for any width, the four corners of each square one after another."""
    numbers = pixel_unshuffle(torch.arange(16).view(1, 4, 4, 1))[0]
    assert numbers.tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7]], [[8, 9, 12, 13], [10, 11, 14, 15]]]
    x = torch.randn(2, 6, 4, 3)
    corners = [x[:, 0::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 0::2], x[:, 1::2, 1::2]]
    assert torch.equal(pixel_unshuffle(x), torch.cat(corners, dim=-1))


@torch.no_grad()
def test_image_tokens_are_the_projected_squares() -> None:
    model, tiles = make(), make_tiles(1)
    square = model.vision_model.embeddings(tiles)[0, 2:, :2].reshape(-1)  # the lower left 2 x 2 patches: the third of 4 tokens
    norm, enter, _, leave = model.mlp1
    normed = F.layer_norm(square, square.shape, norm.weight, norm.bias, 1e-5)
    torch.testing.assert_close(model.encode(tiles)[0, 2], leave(F.gelu(enter(normed))))


def test_everything_but_the_class_slot_learns() -> None:
    model = make()
    model(IDS, make_tiles(1, 2)).logsumexp(dim=1).sum().backward()
    silent = {name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    assert silent == {"vision_model.embeddings.class_embedding"}
    gradient = model.vision_model.embeddings.position_embedding.grad
    assert gradient is not None and gradient[0].any(dim=1).tolist() == [False] + [True] * 16


def test_image_tokens_and_tiles_must_match() -> None:
    with pytest.raises(AssertionError, match="8 image tokens, but 4 features"):
        make()(IDS, make_tiles(1))


def test_names_and_shapes_are_those_of_released_checkpoints() -> None:
    with torch.device("meta"):
        model = MonoReference(MONO_INTERNVL_2B)
    vision, language = "vision_model.embeddings.", "language_model."
    layer = {
        "attention.wqkv.weight": (4096, 2048),
        "attention.wo.weight": (2048, 2048),
        "attention_norm.weight": (2048,),
        "ffn_norm.weight": (2048,),
        **{f"{network}.{w}.weight": (8192, 2048) for network in ("feed_forward", "feed_forward_ve") for w in ("w1", "w3")},
        **{f"{network}.w2.weight": (2048, 8192) for network in ("feed_forward", "feed_forward_ve")},
    }
    expected = {
        f"{vision}class_embedding": (1, 1, 1024),
        f"{vision}position_embedding": (1, 1025, 1024),
        f"{vision}patch_embedding.weight": (1024, 3, 14, 14),
        f"{vision}patch_embedding.bias": (1024,),
        "mlp1.0.weight": (4096,),
        "mlp1.0.bias": (4096,),
        "mlp1.1.weight": (2048, 4096),
        "mlp1.1.bias": (2048,),
        "mlp1.3.weight": (2048, 2048),
        "mlp1.3.bias": (2048,),
        f"{language}model.tok_embeddings.weight": (92553, 2048),
        f"{language}model.norm.weight": (2048,),
        f"{language}output.weight": (92553, 2048),
        **{f"{language}model.layers.{i}.{name}": shape for i in range(24) for name, shape in layer.items()},
    }
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected
    assert len(expected) == 253
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_111_355_392
    assert model.encode(torch.empty(5, 3, 448, 448, device="meta")).shape == (5, 256, 2048)
