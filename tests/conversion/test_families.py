"""InfiMM and Mono-InternVL: exported under released names, imported bit-identically, initialised from plain language models and towers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.converted import internlm2, same, stored, tensors, weights, written
from support.hf_models import make_language, make_vision, save
from support.references import infimm_reference, mono_reference
from support.small_infimm import small_infimm
from support.small_mono import small_mono

from megatron_mm.config import Experiment
from megatron_mm.config.towers import EVA01_G_14_224, EVA02_BIGE_14_224, EVA02_L_14_336
from megatron_mm.conversion.from_hf import convert_from_hf
from megatron_mm.conversion.to_hf import convert_to_hf
from megatron_mm.data.text.tokenizer import Tokenizer
from megatron_mm.families.infimm.files import infimm_config, infimm_settings
from megatron_mm.families.recipes import get_recipe
from megatron_mm.families.registry import family_of

EXPORTED: dict[str, dict[str, Any]] = {"infimm": {"attention_window": 512}, "mono_internvl": {"rotary_scaling": 2.0}}
"""Decoder fields that only affect exports."""
SMALL = {"infimm": small_infimm, "mono_internvl": small_mono}


def small(family: str, tokenizer: Path | None = None, *, precision: str = "fp32") -> Experiment:
    """Return an experiment with the shapes of `hf_models`' decoders and room for the tokenizer."""
    decoder = {"vocab_size": 416, "head_dim": 16, "rotary_base": 500.0, "max_positions": 4096, **EXPORTED[family]}
    settings = SMALL[family](decoder=decoder)
    data = replace(settings.data, tokenizer=tokenizer, max_tiles=6 if family == "mono_internvl" else None, to_rgb="pillow")
    return replace(settings, data=data, train=replace(settings.train, precision=precision))


@pytest.mark.parametrize(
    ("family", "world_size", "parallel", "precision"),
    [
        ("infimm", 1, {}, "fp32"),
        ("mono_internvl", 1, {}, "bf16"),
        pytest.param("infimm", 4, {"tensor": 2, "pipeline": 2}, "bf16", marks=pytest.mark.slow),
        pytest.param("mono_internvl", 4, {"tensor": 2, "pipeline": 2}, "fp32", marks=pytest.mark.slow),
    ],
)
def test_released_names_and_back(
    family: str, world_size: int, parallel: dict[str, Any], precision: str, tokenizer_path: Path, tmp_path: Path
) -> None:
    settings = small(family, tokenizer_path, precision=precision)
    before = written(settings, tmp_path / "run", parallel, world_size=world_size)
    convert_to_hf(tmp_path / "run", tmp_path / "hf", shard_size="60KB")
    exported, plain = weights(tmp_path / "hf"), reference(settings)
    assert exported.keys() == plain.state_dict().keys()
    for name, value in plain.named_buffers():  # buffers that follow from the configuration are written, too
        torch.testing.assert_close(exported[name], value)
    made = convert_from_hf(settings, tmp_path / "again", whole=tmp_path / "hf")
    assert not made.drawn and same(stored(tmp_path / "again"), before)
    convert_to_hf(tmp_path / "again", tmp_path / "hf again", shard_size="60KB")
    first, again = documents(tmp_path / "hf"), documents(tmp_path / "hf again")
    assert first == again and {"config.json", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json"} <= first.keys()
    config = json.loads(first["config.json"])
    if family == "infimm":
        assert (config["language"]["sliding_window"], config["language"]["max_position_embeddings"]) == (512, 4096)
        assert config["language"]["pad_token_id"] == config["eos_token_id"]
    else:
        assert config["llm_config"]["rope_scaling"] == {"type": "dynamic", "factor": 2.0} and config["max_dynamic_patch"] == 6
        assert config["use_thumbnail"] is True and config["select_layer"] == -1 and config["template"] == "internlm2-chat"


def documents(folder: Path) -> dict[str, str]:
    """Return the contents of all files except weights and README.md, which states the number of training steps."""
    return {path.name: path.read_text() for path in folder.glob("*") if path.suffix in (".json", ".jinja", ".py")}


def reference(settings: Experiment) -> torch.nn.Module:
    """Return the reference model of the same shape, with the names of released checkpoints."""
    if settings.model.family == "infimm":
        return infimm_reference(settings.model)  # type: ignore[arg-type]
    return mono_reference(settings.model)  # type: ignore[arg-type]


def test_a_language_model_fills_text_and_visual_experts_alike(tmp_path: Path) -> None:
    packed, plain = internlm2(tmp_path)
    for source in (packed, plain):
        made = convert_from_hf(small("mono_internvl"), tmp_path / f"from_{source.name}", language=source)
        assert set(made.drawn) == {"patches", "projector"}
    found, other = tensors(tmp_path / "from_internlm2"), tensors(tmp_path / "from_llama")
    assert same(
        {k: v for k, v in found.items() if k.startswith("language.")}, {k: v for k, v in other.items() if k.startswith("language.")}
    )
    text = {name: value for name, value in found.items() if ".mlp.text." in name}
    assert len(text) == 8 and all(torch.equal(value, found[name.replace(".text.", ".visual.")]) for name, value in text.items())
    source = load_file(plain / "model.safetensors")
    gate_and_up = torch.cat([source[f"model.layers.2.mlp.{name}_proj.weight"] for name in ("gate", "up")])
    assert torch.equal(found["language.decoder.layers.2.mlp.visual.linear_fc1.weight"], gate_and_up)


def test_infimm_begins_with_a_mistral_and_an_eva_tower(tokenizer_path: Path, tmp_path: Path) -> None:
    """The tower has its authors' names and comes with its text model."""
    settings = small("infimm", tokenizer_path)
    language = save(make_language("mistral"), tmp_path / "mistral")
    whole = reference(settings).state_dict()
    tower = {name.removeprefix("model.vision_encoder."): t.clone() for name, t in whole.items() if name.startswith("model.vision_encoder.")}
    extra = {"text.token_embedding.weight": torch.ones(4, 8), "logit_scale": torch.tensor(1.0)}
    (tmp_path / "eva").mkdir()
    save_file({**{f"visual.{name}": t for name, t in tower.items()}, **extra}, tmp_path / "eva" / "model.safetensors")
    made = convert_from_hf(settings, tmp_path / "run", language=language, vision=tmp_path / "eva")
    assert set(made.sources) == {"language (llama)", "vision (eva_clip)"} and set(made.drawn) == {"resampler", "language"}
    found = tensors(tmp_path / "run")
    assert torch.equal(found["vision.position_embedding"], tower["pos_embed"][0])
    assert all(not value.any() for name, value in found.items() if name.endswith("_gate")), "a fresh gated block changes nothing"
    convert_to_hf(tmp_path / "run", tmp_path / "language", part="language", architecture="mistral", vocab_rows=400)
    assert same(weights(tmp_path / "language"), weights(language))


def test_part_of_another_family_is_refused(tokenizer_path: Path, tmp_path: Path) -> None:
    written(small("mono_internvl", tokenizer_path), tmp_path / "run")
    with pytest.raises(ValueError, match="has visual experts, which a Llama does not have"):
        convert_to_hf(tmp_path / "run", tmp_path / "out", part="language")
    with pytest.raises(ValueError, match=r"has no tower that a CLIPVisionModel could hold"):
        convert_to_hf(tmp_path / "run", tmp_path / "out", part="vision")
    vision = save(make_vision(), tmp_path / "vision")
    with pytest.raises(ValueError, match="family mono_internvl has no image tower: leave out --vision"):
        convert_from_hf(small("mono_internvl"), tmp_path / "new", vision=vision)
    with pytest.raises(ValueError, match="of format clip, which infimm models do not support as --vision: choose another recipe"):
        convert_from_hf(small("infimm"), tmp_path / "new", vision=vision)


def test_released_configurations_are_checked(tokenizer_path: Path, tmp_path: Path) -> None:
    """A recipe that differs from the file in one field is refused, with the field's name."""
    settings = small("infimm", tokenizer_path)
    written(settings, tmp_path / "run")
    convert_to_hf(tmp_path / "run", tmp_path / "hf")
    document = json.loads((tmp_path / "hf" / "config.json").read_text())
    ids = Tokenizer.open(tokenizer_path, special=family_of(settings.model).special_tokens)
    assert document["eoc_token_id"] == ids.special_id("<|endofchunk|>") and document["image_token_id"] == ids.special_id("<image>")
    changed = {**document, "cross_attn_every_n_layers": 4}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"gated\.every_n_layers is 4 there and 2 in the recipe"):
        convert_from_hf(settings, tmp_path / "again", whole=tmp_path / "hf")
    changed = {**document, "visual": {**document["visual"], "rope": False, "intp_freq": False}}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"vision\.rotary_grid is None there and 4 in the recipe"):
        convert_from_hf(settings, tmp_path / "again", whole=tmp_path / "hf")


@pytest.mark.parametrize("tower", [EVA02_L_14_336, EVA01_G_14_224, EVA02_BIGE_14_224], ids=["L", "g", "bigE"])
def test_towers_are_described_as_they_are(tower: Any, tokenizer_path: Path) -> None:
    recipe = get_recipe("infimm_zephyr_7b_pt")
    settings = replace(recipe, model=replace(recipe.model, vision=tower))  # type: ignore[call-arg]
    ids = Tokenizer.open(tokenizer_path, special=family_of(recipe.model).special_tokens)
    fields = infimm_settings(
        infimm_config(settings.model, ids, sequence_length=384, language_is_frozen=True, dtype="bfloat16", vocab_rows=None)
    )
    for name, value in fields.items():
        part, field = name.split(".")
        assert getattr(getattr(settings.model, part), field) == value, name
