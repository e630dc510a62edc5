"""MM1's fine-tuning in every layout: initialised from a run of another image size, on real pictures split into sub-images, with some
demonstrations at low resolution. Losses of 20 steps equal those of one process."""

from __future__ import annotations

import functools
import json
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_processes
from support.small import small_run

from megatron_mm.config import Experiment, MoEConfig
from megatron_mm.conversion.from_hf import convert_from_hf
from megatron_mm.conversion.reader import CheckpointReader
from megatron_mm.conversion.to_hf import convert_to_hf
from megatron_mm.data.sub_images import SubImages
from megatron_mm.families.mm1.config import MM1Config
from megatron_mm.hf.mapping import Positions
from megatron_mm.run.start import assemble, check, start
from megatron_mm.training.checkpoint import find_checkpoint

STEPS = 20


@dataclass(frozen=True)
class Layout:
    world_size: int
    parallel: dict[str, Any] = field(default_factory=dict)
    moe: MoEConfig | None = None

    def __str__(self) -> str:
        return " ".join([*(f"{name}={value}" for name, value in self.parallel.items()), f"on {self.world_size}"])


ALONE = Layout(1)
EXPERTS = MoEConfig(num_experts=4, every_n_layers=2)
LAYOUTS = [Layout(2, {"tensor": 2})]
MORE_LAYOUTS = [
    Layout(2, {}),
    Layout(2, {"pipeline": 2}),
    Layout(2, {"pipeline": 2, "virtual": 2}),
    Layout(4, {"tensor": 2, "pipeline": 2}),
    Layout(4, {"tensor": 4, "recompute": "full"}),
    Layout(2, {"pipeline": 2, "recompute_encoder": "full"}),
    Layout(2, {"pipeline": 2, "spread_encoder": True}),
    Layout(4, {"tensor": 2, "pipeline": 2, "virtual": 2, "spread_encoder": True}),
    Layout(2, {"expert": 2}, EXPERTS),
    Layout(4, {"tensor": 2, "expert": 2}, EXPERTS),
]
POSITIONS = ("vision.position_embedding", "connector.position_embedding")


def pretraining(data: Path, moe: MoEConfig | None = None) -> Experiment:
    """Return the pre-training experiment: images of 16 px, each one square."""
    return _sparse(small_run(data, steps=2, schedule_steps=2), moe)


def fine_tuning(data: Path, layout: Layout = ALONE, *, steps: int = STEPS) -> Experiment:
    """Return the fine-tuning experiment: sub-images of 24 px (45 tokens per image), interleaved documents and conversations."""
    base = small_run(data, parallel=layout.parallel, steps=steps, schedule_steps=steps, global_batch_size=4)
    assert isinstance(base.model, MM1Config)
    model = replace(base.model, vision=replace(base.model.vision, image_size=24), sub_images=SubImages())
    fields = {"mixture": {"interleaved": 0.5, "conversations": 0.5}, "sequence_length": 192, "low_resolution_demonstrations": 0.5}
    return _sparse(replace(base, model=model, data=replace(base.data, **fields)), layout.moe)


def _sparse(base: Experiment, moe: MoEConfig | None) -> Experiment:
    return replace(base, model=replace(base.model, decoder=replace(base.model.decoder, moe=moe)))


def _start(experiment: Experiment, run_dir: Path) -> None:
    start(experiment, run_dir)


def _begin(experiment: Experiment, run_dir: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Assemble a run; return the weights before the first step, and the log lines."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_mm").addHandler(handler)
    logging.getLogger("megatron_mm").setLevel(logging.INFO)
    trainer = assemble(check(experiment, run_dir), run_dir)
    trainer.data.close()
    return {name: p.detach().clone() for chunk in trainer.model for name, p in chunk.module.named_parameters()}, lines


@pytest.fixture(scope="module")
def pretrained(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Function that returns the pre-training run directory for given experts."""

    @functools.cache
    def run(moe: MoEConfig | None) -> Path:
        run_dir = tmp_path_factory.mktemp("pretrained") / "run"
        run_processes(_start, 1, pretraining(demo_data, moe), run_dir)
        return run_dir

    return run


@pytest.fixture(scope="module")
def losses(demo_data: Path, tmp_path_factory: pytest.TempPathFactory, pretrained: Any) -> Any:
    """Function that returns the losses of fine-tuning in a layout."""

    @functools.cache
    def train(world_size: int, parallel: tuple[Any, ...], moe: MoEConfig | None) -> list[float]:
        layout = Layout(world_size, dict(parallel), moe)
        run_dir = tmp_path_factory.mktemp("tuned") / "run"
        run_processes(_start, world_size, replace(fine_tuning(demo_data, layout), init_from=pretrained(moe)), run_dir)
        return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").open()]

    return train


@pytest.mark.parametrize("layout", [*LAYOUTS, *(pytest.param(more, marks=pytest.mark.slow) for more in MORE_LAYOUTS)], ids=str)
def test_losses_equal_those_of_one_process(layout: Layout, losses: Any) -> None:
    found, alone = losses(layout.world_size, tuple(layout.parallel.items()), layout.moe), losses(1, (), layout.moe)
    assert found == pytest.approx(alone, rel=1e-5) and len(found) == STEPS
    assert alone[-1] < 0.9 * alone[0], "something was learned"


def test_positions_are_interpolated_as_conversion_does_it(
    demo_data: Path, tmp_path: Path, pretrained: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """--init-from and from-hf of the export yield the same positions, leave all other weights unchanged, and log a line."""
    settings, run_dir = replace(fine_tuning(demo_data, steps=1), init_from=pretrained(None)), pretrained(None)
    (begun,) = run_processes(_begin, 1, settings, tmp_path / "begun")
    weights, lines = begun
    for name in POSITIONS:
        assert f"{name}: positions of 4 x 4 patches are interpolated to 6 x 6 (bicubic)" in lines
    reader = CheckpointReader(find_checkpoint(run_dir))
    for name in reader.names():
        stored, first = reader.read(name), int(name.startswith("vision"))
        if name in POSITIONS:
            expected = Positions(name, name, num_patches=36, class_token=bool(first)).from_hf((stored,))
            assert stored.shape[0] == 16 + first and torch.equal(weights[name], expected)
            grid = torch.nn.functional.interpolate(stored[first:].T.reshape(1, -1, 4, 4), size=(6, 6), mode="bicubic", align_corners=False)
            torch.testing.assert_close(weights[name][first:], grid[0].flatten(1).T, atol=1e-6, rtol=1e-6)
        else:
            assert torch.equal(weights[name], stored), name
    convert_to_hf(run_dir, tmp_path / "export")
    with caplog.at_level(logging.INFO, logger="megatron_mm"):
        converted = convert_from_hf(settings, tmp_path / "imported", whole=tmp_path / "export")
    assert sum("positions of 4 x 4 patches are interpolated to 6 x 6 (bicubic)" in record.message for record in caplog.records) == 2
    imported = CheckpointReader(converted.checkpoint)
    assert all(torch.equal(imported.read(name), weights[name]) for name in imported.names())


@pytest.mark.slow
def test_every_layout_begins_with_the_same_positions(demo_data: Path, tmp_path: Path, pretrained: Any) -> None:
    found = {}
    for layout in (Layout(1), Layout(4, {"tensor": 2, "pipeline": 2})):
        settings = replace(fine_tuning(demo_data, layout, steps=1), init_from=pretrained(None))
        found[layout.world_size] = [weights for weights, _ in run_processes(_begin, layout.world_size, settings, tmp_path / str(layout))]
    (alone,) = found[1]
    first_stage = [weights for weights in found[4] if POSITIONS[0] in weights]
    assert len(first_stage) == 2
    assert all(torch.equal(weights[name], alone[name]) for weights in first_stage for name in POSITIONS)


def test_only_how_images_are_shown_may_differ(demo_data: Path, tmp_path: Path, pretrained: Any) -> None:
    settings = replace(fine_tuning(demo_data), init_from=pretrained(None))
    check(settings, tmp_path)
    assert isinstance(settings.model, MM1Config)
    other = replace(settings.model, vision=replace(settings.model.vision, patch_size=8))
    with pytest.raises(ValueError, match=r"holds a different model .*: model.vision.patch_size is 4 there and 8 here: use the recipe"):
        check(replace(settings, model=other), tmp_path)
    with pytest.raises(ValueError, match=r"holds a different model .*: model.sub_images is None there and .*model.vision.image_size is 16"):
        check(settings, pretrained(None))  # a resumed run must have the same model
