"""Initial checkpoints made from Hugging Face weights: megatron-core loads them in any layout, with the same outputs."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from safetensors.torch import load_file, save_file
from support.converted import compute, hf_features, hf_logits, internlm2, tensors
from support.distributed import run_processes
from support.hf_models import TOWER, VOCABULARY, experiment, make_language, make_vision, save
from transformers import AutoModelForCausalLM, CLIPVisionModel

from megatron_mm.config import Experiment, MoEConfig, ParallelConfig
from megatron_mm.conversion.from_hf import convert_from_hf
from megatron_mm.conversion.reader import CheckpointReader
from megatron_mm.families.serialize import load_experiment
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.initial_weights import STATE_METADATA
from megatron_mm.platform import engine
from megatron_mm.training.build import build_model
from megatron_mm.training.checkpoint import find_checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_language(), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_vision(), tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def imported(llama: Path, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory with the checkpoint."""
    run_dir = tmp_path_factory.mktemp("imported") / "run"
    convert_from_hf(experiment(), run_dir, language=llama, vision=clip)
    return run_dir


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (4, {"tensor": 2, "pipeline": 2}),
    (2, {"pipeline": 2, "virtual": 2}),
]


@pytest.mark.parametrize(("world_size", "parallel"), LAYOUTS, ids=str)
def test_outputs_are_those_of_transformers_on_every_layout(
    imported: Path, llama: Path, clip: Path, world_size: int, parallel: dict[str, Any]
) -> None:
    """The tolerance is fp32 rounding on logits of about 1."""
    settings = replace(experiment(), parallel=ParallelConfig(**parallel))
    found = run_processes(compute, world_size, settings, imported)
    torch.testing.assert_close(found[-1].logits[:, :VOCABULARY], hf_logits(llama), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[0].features, hf_features(clip, settings), atol=1e-4, rtol=1e-4)
    assert found[-1].logits.std() > 0.1 and found[0].features.std() > 0.1


def _initial(settings: Experiment) -> dict[str, torch.Tensor]:
    """Return the initial weights of training, by global name."""
    topology = topologies.initialize(settings.parallel, seed=settings.train.seed)
    chunk = build_model(settings, topology)[0].module
    state = chunk.sharded_state_dict(metadata=dict(STATE_METADATA))
    apply_factories(state)
    found: dict[str, torch.Tensor] = {}
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensor):
            found.setdefault(entry.key, torch.full(entry.global_shape, float("nan"), dtype=entry.dtype))[engine.place_of(entry)] = (
                entry.data
            )
    topologies.shutdown()
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_no_source_gives_is_drawn_as_training_would(clip: Path, precision: str, tmp_path: Path) -> None:
    """Including experts, routers and the routers' shares."""
    settings = experiment(precision=precision, moe=MoEConfig(num_experts=4, every_n_layers=2))
    made = convert_from_hf(settings, tmp_path, vision=clip)
    assert set(made.drawn) == {"language", "connector"}
    (expected,) = run_processes(_initial, 1, settings)
    found = tensors(tmp_path)
    assert found.keys() == expected.keys() and any(".experts." in name for name in found)
    for name, value in expected.items():
        if not name.startswith("vision."):
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    assert not torch.equal(found["vision.patch_embedding.weight"], expected["vision.patch_embedding.weight"])


def test_the_checkpoint_is_described_and_checked(imported: Path) -> None:
    checkpoint = find_checkpoint(imported)
    assert checkpoint == imported / "checkpoints" / "step_00000000"
    assert load_experiment(checkpoint / "experiment.json") == experiment()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["step"] == 0 and manifest["weights_only"] is True
    there = {path.name: [path.stat().st_size, zlib.crc32(path.read_bytes())] for path in (checkpoint / "tensors").iterdir()}
    assert manifest["files"] == there and len([name for name in there if name.endswith(".distcp")]) >= 1
    assert not list((imported / "checkpoints").glob(".*"))


def test_internlm2_is_the_same_decoder_under_other_names(tmp_path: Path) -> None:
    packed, plain = internlm2(tmp_path)
    convert_from_hf(experiment(), tmp_path / "packed", language=packed)
    convert_from_hf(experiment(), tmp_path / "plain", language=plain)
    left, right = tensors(tmp_path / "packed"), tensors(tmp_path / "plain")
    assert all(torch.equal(left[name], right[name]) for name in right)


def open_clip(vision: Path, folder: Path, *, quick_gelu: bool = True) -> Path:
    """Write a tower with open_clip's names and a text model that is not read, pickled as such checkpoints are."""
    state, theirs = load_file(vision / "model.safetensors"), {}
    names = {
        "class_embedding": "embeddings.class_embedding",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
    }
    for kind in ("weight", "bias"):
        names |= {f"ln_pre.{kind}": f"pre_layrnorm.{kind}", f"ln_post.{kind}": f"post_layernorm.{kind}"}
        for layer in range(TOWER["num_hidden_layers"]):
            block, old = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
            stacked = torch.cat([state[f"{old}.self_attn.{x}_proj.{kind}"] for x in "qkv"])
            theirs[f"visual.{block}.attn.in_proj_{kind}"] = stacked
            pairs = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
            pairs |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
            names |= {f"{block}.{new}.{kind}": f"{old}.{name}.{kind}" for new, name in pairs.items()}
    theirs |= {f"visual.{new}": state[old] for new, old in names.items()}
    theirs |= {"visual.proj": torch.ones(32, 8), "logit_scale": torch.tensor(1.0), "token_embedding.weight": torch.ones(4, 8)}
    theirs |= {"transformer.resblocks.0.ln_1.weight": torch.ones(8), "positional_embedding": torch.ones(7, 8)}
    folder.mkdir()
    torch.save(theirs, folder / "open_clip_pytorch_model.bin")
    tower = {"layers": 2, "width": 32, "head_width": 8, "patch_size": 4, "image_size": 32, "mlp_ratio": 2.0}
    document = {"model_cfg": {"vision_cfg": tower, "quick_gelu": quick_gelu}}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    return folder


def test_open_clip_is_the_same_tower_under_other_names(clip: Path, tmp_path: Path) -> None:
    convert_from_hf(experiment(), tmp_path / "stacked", vision=open_clip(clip, tmp_path / "open_clip"))
    convert_from_hf(experiment(), tmp_path / "plain", vision=clip)
    left, right = tensors(tmp_path / "stacked"), tensors(tmp_path / "plain")
    assert all(torch.equal(left[name], right[name]) for name in right)


def test_open_clips_activation_must_be_the_recipes(clip: Path, tmp_path: Path) -> None:
    source = open_clip(clip, tmp_path / "open_clip", quick_gelu=False)
    with pytest.raises(ValueError, match=r"activation is gelu there and quick_gelu in the recipe \(--model\.vision\.activation gelu\)"):
        convert_from_hf(experiment(), tmp_path / "run", vision=source)


def test_a_whole_clip_model_gives_its_tower_with_or_without_prefix(clip: Path, tmp_path: Path) -> None:
    """As on the Hugging Face hub: the tower together with the text model."""
    state = load_file(clip / "model.safetensors")
    whole = {f"vision_model.{name}": tensor for name, tensor in state.items()}
    whole |= {"text_model.embeddings.token_embedding.weight": torch.ones(4, 8), "logit_scale": torch.tensor(1.0)}
    whole |= {"vision_model.embeddings.position_ids": torch.arange(65)[None], "visual_projection.weight": torch.ones(8, 32)}
    (tmp_path / "hub").mkdir()
    save_file(whole, tmp_path / "hub" / "model.safetensors")
    document = json.loads((clip / "config.json").read_text())
    (tmp_path / "hub" / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": document}))
    convert_from_hf(experiment(), tmp_path / "left", vision=tmp_path / "hub")
    convert_from_hf(experiment(), tmp_path / "right", vision=clip)
    left, right = tensors(tmp_path / "left"), tensors(tmp_path / "right")
    assert all(torch.equal(left[name], right[name]) for name in right)


def test_another_resolution_and_more_tokens(llama: Path, clip: Path, tmp_path: Path) -> None:
    """Matching weights are unchanged; positions are interpolated as `Positions` does, and new tokens get the mean embedding."""
    convert_from_hf(experiment(image_size=48, vocab_size=480), tmp_path / "run", language=llama, vision=clip)
    found, table = tensors(tmp_path / "run"), AutoModelForCausalLM.from_pretrained(llama).model.embed_tokens.weight.detach()
    embeddings = found["language.embedding.word_embeddings.weight"]
    assert embeddings.shape == (480, 64) and torch.equal(embeddings[:VOCABULARY], table)
    assert torch.equal(embeddings[VOCABULARY:], table.mean(dim=0).expand(80, -1))
    old = load_file(clip / "model.safetensors")["embeddings.position_embedding.weight"]
    new = found["vision.position_embedding"]
    assert old.shape == (65, 32) and new.shape == (145, 32) and torch.equal(new[0], old[0])
    tower = CLIPVisionModel.from_pretrained(clip)
    with torch.no_grad():
        expected = tower.embeddings.interpolate_pos_encoding(torch.zeros(1, 145, 32), 48, 48)[0]
    torch.testing.assert_close(new, expected)


def test_a_tied_source_fills_an_untied_recipe(tmp_path: Path) -> None:
    source = save(make_language(tie_word_embeddings=True), tmp_path / "tied")
    convert_from_hf(experiment(), tmp_path / "untied", language=source)
    found = tensors(tmp_path / "untied")
    assert torch.equal(found["language.output_layer.weight"], found["language.embedding.word_embeddings.weight"])
    convert_from_hf(experiment(tied_embeddings=True), tmp_path / "again", language=source)
    assert "language.output_layer.weight" not in tensors(tmp_path / "again")


def test_float16_is_rounded_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = save(make_language(), tmp_path / "half", dtype=torch.float16)
    convert_from_hf(experiment(precision="bf16"), tmp_path / "bf16", language=source)
    assert "are float16 and are rounded to bfloat16" in caplog.text
    caplog.clear()
    convert_from_hf(experiment(precision="fp32"), tmp_path / "fp32", language=source)
    assert "rounded" not in caplog.text


def test_longer_sequences_than_the_source_knows_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = save(make_language("mistral", sliding_window=128), tmp_path / "mistral")
    convert_from_hf(experiment(), tmp_path / "run", language=source)
    assert "has sliding_window 128, but sequences have 256 tokens: its attention window is not applied" in caplog.text
    assert "max_position_embeddings" not in caplog.text


def test_fp8_recipes_keep_bfloat16_weights(llama: Path, tmp_path: Path) -> None:
    made = convert_from_hf(experiment(precision="fp8"), tmp_path, language=llama)
    assert {info.dtype for info in CheckpointReader(made.checkpoint).names().values()} == {torch.bfloat16}
