"""The EVA-CLIP towers against a tower written out from its definition, under the names of released checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support.infimm_reference import EvaReference
from support.random_weights import randomize
from support.references import tower_sizes

from megatron_mm.config import EvaConfig, ParallelConfig
from megatron_mm.config.towers import EVA01_G_14_224, EVA02_BIGE_14_224, EVA02_L_14_336, EVA_TINY
from megatron_mm.hf.mapping import from_hf
from megatron_mm.hf.towers import eva_table
from megatron_mm.models.eva import EvaSwiGLU, EvaTower, PaddedSwiGLU, Turn, _gated_norm, rotary_angles
from megatron_mm.parallel import topology
from megatron_mm.parallel.replicated import replicated_state

PLAIN = replace(EVA_TINY, swiglu=False, rotary_grid=None)
GEOMETRIES = {
    "tiny": EVA_TINY,
    "as fine as in pre-training": replace(EVA_TINY, rotary_grid=8),
    "no rotary positions": PLAIN,
    "post-norm": replace(PLAIN, block="post_norm"),
    "pixels left over": replace(EVA_TINY, image_size=35),
    "EVA02-L": replace(EVA02_L_14_336, image_size=56, num_layers=2),
    "EVA01-g, heads of 88": replace(EVA01_G_14_224, image_size=28, num_layers=2),
    "EVA02-bigE, heads of 112": replace(EVA02_BIGE_14_224, image_size=28, num_layers=2, ffn_hidden_size=1024),
}


def make_reference(config: EvaConfig) -> EvaReference:
    """Return a reference tower in which every parameter is random, including norms and biases."""
    reference = EvaReference(tower_sizes(config))
    randomize(reference)
    return reference


def make_tower(config: EvaConfig, *, dtype: torch.dtype = torch.float32) -> EvaTower:
    """Return a tower with the weights of `make_reference`."""
    tower = EvaTower(config, dtype=dtype)
    ours = from_hf(eva_table(config), dict(make_reference(config).named_parameters()))
    tower.load_state_dict({name.removeprefix("vision."): tensor for name, tensor in ours.items()}, strict=True)
    return tower


def make_pixels(config: EvaConfig, *, num_images: int) -> torch.Tensor:
    shape = (num_images, 3, config.image_size, config.image_size)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.mark.parametrize("config", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_same_tokens_as_the_reference(config: EvaConfig) -> None:
    """In fp32, the same operations in another order, on tokens of about unit scale. The largest difference measured is 1.6e-5, in post-norm
    towers, whose norms scale up the branches' outputs."""
    pixels = make_pixels(config, num_images=2)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (config.mean, config.std))
    with torch.no_grad():
        expected = make_reference(config)((pixels / 255 - mean) / std)
        tokens = make_tower(config)(pixels)
    assert tokens.shape == (2, config.num_tokens, config.hidden_size)
    assert 0.3 < expected.std() < 6
    torch.testing.assert_close(tokens, expected, atol=3e-5, rtol=1e-5)


def test_images_do_not_see_each_other() -> None:
    tower, pixels = make_tower(EVA_TINY), make_pixels(EVA_TINY, num_images=3)
    with torch.no_grad():
        torch.testing.assert_close(tower(pixels)[1:2], tower(pixels[1:2]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [EVA_TINY, PLAIN])
def test_no_image_is_no_tokens(config: EvaConfig) -> None:
    """A frozen tower needs no blank image: it has no gradients that a reduction would wait for."""
    assert make_tower(config)(make_pixels(config, num_images=0)).shape == (0, config.num_tokens, config.hidden_size)


def test_the_final_norm_and_the_head_take_no_part() -> None:
    tower, pixels = make_tower(EVA_TINY), make_pixels(EVA_TINY, num_images=1)
    with torch.no_grad():
        before = tower(pixels)
        for parameter in (*tower.norm.parameters(), *tower.head.parameters()):
            parameter.fill_(float("nan"))
        torch.testing.assert_close(tower(pixels), before, atol=0, rtol=0)


def test_positions_are_turned_by_row_then_column() -> None:
    """The worked example of `rotary_angles`: heads of width 8, 2 x 2 patches at positions 0 and 2."""
    angles = rotary_angles(replace(EVA_TINY, image_size=8, hidden_size=16, num_attention_heads=2))
    expected = [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 2, 0.02], [2, 0.02, 0, 0], [2, 0.02, 2, 0.02]]
    assert angles is not None
    torch.testing.assert_close(angles, torch.tensor(expected, dtype=torch.float32))
    quarter = torch.full((1, 1), torch.pi / 2)
    turned = Turn(quarter)(torch.tensor([[[[3.0, 5.0]]]]))
    torch.testing.assert_close(turned, torch.tensor([[[[-5.0, 3.0]]]]))


def test_no_graph_is_kept() -> None:
    """Neither under no_grad nor if the tower is frozen; and no parameter has a gradient."""
    tower, pixels = make_tower(EVA_TINY), make_pixels(EVA_TINY, num_images=2)
    assert tower(pixels).requires_grad, "otherwise this test says nothing"
    with torch.no_grad():
        assert not tower(pixels).requires_grad
    tower.requires_grad_(False)
    assert not tower(pixels).requires_grad
    assert all(parameter.grad is None for parameter in tower.parameters())


@pytest.mark.parametrize("config", [EVA_TINY, PLAIN, replace(PLAIN, block="post_norm")])
def test_bf16_follows_fp32(config: EvaConfig) -> None:
    """Two layers in bf16: a few steps of 2^-8 on tokens of about unit scale."""
    pixels = make_pixels(config, num_images=2)
    with torch.no_grad():
        exact, rounded = make_tower(config)(pixels), make_tower(config, dtype=torch.bfloat16)(pixels)
    assert rounded.dtype is torch.bfloat16
    assert (rounded.float() - exact).abs().mean() < 0.03 * exact.std()


@pytest.mark.parametrize(
    ("config", "expected"),
    [(EVA02_L_14_336, 304_432_832), (EVA01_G_14_224, 1_012_588_928), (EVA02_BIGE_14_224, 4_350_556_928), (EVA_TINY, 110_256)],
)
def test_sizes(config: EvaConfig, expected: int) -> None:
    with torch.device("meta"):
        tower = EvaTower(config, dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in tower.parameters()) == expected
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("config", [EVA_TINY, PLAIN])
def test_every_matrix_says_its_initial_scale(config: EvaConfig) -> None:
    tower = EvaTower(config, dtype=torch.float32)
    unmarked = [name for name, p in tower.named_parameters() if not hasattr(p, "init_std")]
    assert all(name.endswith((".bias", "norm.weight")) for name in unmarked)
    layer = tower.layers[0]
    assert layer.attention.qkv.weight.init_std == layer.mlp.up.weight.init_std == 1 / 8
    assert layer.attention.output.weight.init_std == 1 / 16, "of 2 layers with 2 branches each"


def test_wrong_image_size_is_refused() -> None:
    with pytest.raises(AssertionError, match="takes"):
        make_tower(EVA_TINY)(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


class TestPaddedRows:
    """A fused tower whose SwiGLU has rows of 170 numbers computes in rows of 192, and is the same function of the same parameters."""

    CONFIG = replace(EVA_TINY, rotary_grid=None)  # a fused tower rotates with a kernel of Transformer Engine

    @pytest.fixture(autouse=True)
    def uncompiled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("megatron.core.jit.jit_fuser", lambda function: function)

    def pair(self, *, dtype: torch.dtype = torch.float32) -> tuple[EvaTower, EvaTower]:
        """Return a plain tower and a fused one that has loaded its checkpoint."""
        plain, fused = make_tower(self.CONFIG, dtype=dtype), EvaTower(self.CONFIG, dtype=dtype, fused=True)
        fused.load_state_dict(plain.state_dict(), strict=True)
        assert all(isinstance(layer.mlp, PaddedSwiGLU) for layer in fused.layers) and not isinstance(plain.layers[0].mlp, PaddedSwiGLU)
        return plain, fused

    def test_same_parameters(self) -> None:
        plain, fused = ({name: p for name, p in tower.named_parameters()} for tower in self.pair())
        assert list(fused) == list(plain)
        for name, parameter in fused.items():
            assert torch.equal(parameter, plain[name]) and parameter.is_contiguous()
            assert vars(parameter) == vars(plain[name]), "initial values"

    def test_products_have_padded_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plain, fused = self.pair()
        shapes = []
        product = torch.nn.functional.linear
        monkeypatch.setattr("torch.nn.functional.linear", lambda x, w, b=None: (shapes.append((*x.shape, *w.shape)), product(x, w, b))[1])
        for tower in (plain, fused):
            tower.layers[0].mlp(torch.zeros(2, 5, 64))
        assert shapes == [(2, 5, 64, 170, 64)] * 2 + [(2, 5, 170, 64, 170), (2, 5, 64, 384, 64), (2, 5, 192, 64, 192)]

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
    def test_same_results_and_gradients(self, dtype: torch.dtype, tolerance: float) -> None:
        """In fp32 up to the order of sums. In bf16 a few steps of 2^-8, because fewer intermediate values are rounded."""
        plain, padded = (tower.layers[0].mlp for tower in self.pair(dtype=dtype))
        generator = torch.Generator().manual_seed(1)
        found = []
        for mlp in (plain, padded):
            x = torch.randn(2, 65, 64, generator=generator.manual_seed(2)).to(dtype).requires_grad_()
            out = mlp(x)
            out.backward(torch.randn(out.shape, generator=generator).to(dtype))
            found.append([out, x.grad, *(parameter.grad for parameter in mlp.parameters())])
        for expected, ours in zip(*found, strict=True):
            assert ours.dtype is expected.dtype and ours.shape == expected.shape
            assert (ours - expected).norm() < tolerance * expected.norm()

    def test_bf16_is_as_close_to_fp32_as_without_padding(self) -> None:
        exact = self.pair()[0].layers[0].mlp
        x = torch.randn(2, 65, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
        with torch.no_grad():
            plain, padded = ((tower.layers[0].mlp(x) - exact(x.float())).norm() for tower in self.pair(dtype=torch.bfloat16))
        assert 0 < padded < 1.1 * plain

    @pytest.mark.parametrize("images", [0, 1, 3])
    def test_same_tokens(self, images: int) -> None:
        plain, fused = self.pair()
        pixels = make_pixels(self.CONFIG, num_images=images)
        with torch.no_grad():
            torch.testing.assert_close(fused(pixels), plain(pixels), atol=1e-5, rtol=1e-5)

    def test_changed_weights_are_used(self) -> None:
        """Also if they are changed through `.data`, or replaced with other memory, as the data-parallel wrapper does with trained ones."""
        plain, padded = (tower.layers[0].mlp for tower in self.pair())
        x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1))
        padded(x)
        for mlp in (plain, padded):
            mlp.gate.weight.detach().mul_(1.5)
            mlp.down.weight.data.mul_(0.5)
            mlp.up.weight.data = mlp.up.weight.data * 2
        torch.testing.assert_close(padded(x), plain(x))

    def test_the_variance_is_that_of_centred_values(self) -> None:
        """The mean is a thousand times the deviation: E[x^2] - E[x]^2 would have no correct digit in fp32."""
        up = 1000 + torch.randn(1, 1, 170, generator=torch.Generator().manual_seed(1))
        product = torch.cat([torch.full((1, 1, 170), 20.0), torch.zeros(1, 1, 22), up, torch.zeros(1, 1, 22)], dim=-1)
        zero, one = torch.zeros(170), torch.ones(170)
        found = _gated_norm(product, one, zero, 1e-6)
        gated = product[..., :170].double() * up.double()  # SiLU(20) is 20 to 2e-9
        torch.testing.assert_close(found[..., :170].double(), torch.nn.functional.layer_norm(gated, (170,), eps=1e-6), atol=1e-3, rtol=1e-3)
        assert not found[..., 170:].any()

    def test_the_norm_compiles_as_a_whole(self) -> None:
        compiled = torch.compile(_gated_norm, fullgraph=True, backend="eager")
        for rows in (2, 3, 0):
            product, vector = torch.ones(rows, 5, 384), torch.ones(170)
            assert torch.equal(compiled(product, vector, vector, 1e-6), _gated_norm(product, vector, vector, 1e-6))

    @pytest.mark.parametrize("config", [PLAIN, replace(CONFIG, ffn_hidden_size=176)])
    def test_other_towers_have_no_padding(self, config: EvaConfig) -> None:
        with torch.device("meta"):
            mlp = EvaTower(config, dtype=torch.bfloat16, fused=True).layers[0].mlp
        assert not isinstance(mlp, PaddedSwiGLU) and isinstance(mlp, EvaSwiGLU) == config.swiglu

    def test_of_the_full_size(self) -> None:
        with torch.device("meta"):
            tower = EvaTower(EVA02_L_14_336, dtype=torch.bfloat16, fused=True)
        assert {tuple(layer.mlp.blank.shape) for layer in tower.layers} == {(2752 - 2730, 1024)}
        assert sum(parameter.numel() for parameter in tower.parameters()) == 304_432_832


class TestCheckpoint:
    @pytest.fixture(scope="class", autouse=True)
    def one_process(self) -> Iterator[None]:
        topology.initialize(ParallelConfig(), seed=1)
        yield
        topology.shutdown()

    @pytest.mark.parametrize("fused", [False, True])
    def test_checkpoints_hold_parameters_and_no_buffers(self, fused: bool) -> None:
        tower = EvaTower(EVA_TINY, dtype=torch.float32, fused=fused)
        names = {f"vision.{name}" for name, _ in tower.named_parameters()}
        assert set(replicated_state(tower, prefix="vision.")) == names
        assert set(tower.state_dict()) == {name.removeprefix("vision.") for name in names}
