"""Released configurations: what is computed otherwise is refused by name, what is unknown is said, what is true survives a round trip."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import megatron_mm
from megatron_mm.config import Experiment
from megatron_mm.data.text.tokenizer import Tokenizer
from megatron_mm.families.infimm import files as infimm
from megatron_mm.families.mono_internvl import files as mono
from megatron_mm.families.recipes import get_recipe
from megatron_mm.families.registry import family_of
from megatron_mm.hf.fields import table_lines

DOCS = Path(megatron_mm.__path__[0]).parent / "docs" / "config_fields.md"
ZEPHYR_LANGUAGE = {
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "pad_token_id": 2,
    "rope_theta": 10000.0,
    "model_type": "mistral",
}


def mono_document(tokenizer_path: Path) -> dict[str, Any]:
    return mono.mono_internvl_config(*of_recipe("mono_internvl_2b_s2", tokenizer_path), dtype="bfloat16", vocab_rows=92553)


def of_recipe(name: str, tokenizer_path: Path) -> tuple[Any, Experiment, Tokenizer]:
    recipe = get_recipe(name)
    return recipe.model, recipe, Tokenizer.open(tokenizer_path, special=family_of(recipe.model).special_tokens)


def infimm_document(tokenizer_path: Path, name: str = "infimm_zephyr_7b_ift") -> dict[str, Any]:
    model, recipe, ids = of_recipe(name, tokenizer_path)
    length = recipe.data.sequence_length
    return infimm.infimm_config(model, ids, sequence_length=length, language_is_frozen=True, dtype="bfloat16", vocab_rows=None)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("ps_version", "v1", "ps_version is 'v1', but our model computes 'v2'"),
        ("ps_version", None, "ps_version is 'v1'"),  # what the authors' code takes without one
        ("select_layer", -4, "select_layer is -4"),
        ("use_thumbnail", False, "use_thumbnail is False"),
        ("pad2square", True, "pad2square is True"),
        ("use_llm_lora", 16, "use_llm_lora is 16"),
        ("template", "Hermes-2", "template is 'Hermes-2'"),
        ("llm_config", {"architectures": ["InternLM2ForCausalLM"]}, "llm_config.architectures"),
        ("vision_config", {"model_type": "intern_vit_6b"}, "vision_config.model_type is 'intern_vit_6b'"),
    ],
)
def test_a_mono_internvl_that_computes_something_else(field: str, value: Any, told: str, tokenizer_path: Path) -> None:
    document = mono_document(tokenizer_path)
    changed = {**document[field], **value} if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=told.replace("[", r"\[")):
        mono.mono_internvl_settings({**document, field: changed})


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("global_average_pool", True, "visual.global_average_pool is True"),
        ("ls_init_value", 1e-5, "visual.ls_init_value is 1e-05"),
        ("qkv_bias", False, "visual.qkv_bias is False"),
        ("subln", False, "visual.subln differs from visual.naiveswiglu"),
        ("intp_freq", False, "visual.intp_freq differs from visual.rope"),
    ],
)
def test_an_infimm_tower_that_computes_something_else(field: str, value: Any, told: str, tokenizer_path: Path) -> None:
    document = infimm_document(tokenizer_path)
    with pytest.raises(ValueError, match=told):
        infimm.infimm_settings({**document, "visual": {**document["visual"], field: value}})


def test_fields_that_nobody_knows_are_said(tokenizer_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        infimm.infimm_settings({**infimm_document(tokenizer_path), "temperature": 0.5, "media_time_embedding": True})
    assert "not known here and have no effect: media_time_embedding" in caplog.text


def test_what_is_written_is_read(tokenizer_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for name in ("infimm_zephyr_7b_pt", "infimm_llama_13b_ift", "infimm_vicuna_13b_mtt"):
            settings = infimm.infimm_settings(infimm_document(tokenizer_path, name))
            assert_equal(settings, get_recipe(name).model)
        assert_equal(mono.mono_internvl_settings(mono_document(tokenizer_path)), get_recipe("mono_internvl_2b_s2").model)
    assert not caplog.text


def assert_equal(settings: dict[str, Any], model: Any) -> None:
    for name, value in settings.items():
        part, field = name.split(".")
        assert getattr(getattr(model, part), field) == value, name


def test_lengths_are_the_decoder_s(tokenizer_path: Path) -> None:
    """And not those of training sequences, which are 512 and 8192 here."""
    language = infimm_document(tokenizer_path)["language"]
    assert {name: language[name] for name in ZEPHYR_LANGUAGE} == ZEPHYR_LANGUAGE
    document = mono_document(tokenizer_path)
    assert document["llm_config"]["max_position_embeddings"] == 32768
    assert document["llm_config"]["rope_scaling"] == {"type": "dynamic", "factor": 2.0}
    assert (document["max_dynamic_patch"], document["use_thumbnail"], document["select_layer"]) == (24, True, -1)


def test_who_fits_the_authors_classes() -> None:
    zephyr, llama = (get_recipe(f"infimm_{name}_ift").model for name in ("zephyr_7b", "llama_13b"))
    assert infimm.fits_authors_code(zephyr) and not infimm.fits_authors_code(llama)  # type: ignore[arg-type]
    fewer = replace(zephyr, resampler=replace(zephyr.resampler, num_latents=32))  # type: ignore[attr-defined, call-arg]
    assert not infimm.fits_authors_code(fewer)  # type: ignore[arg-type]


def page(tokenizer_path: Path) -> str:
    """docs/config_fields.md."""
    parts = {
        "InfiMM": table_lines(infimm.CONFIG_FIELDS, infimm_document(tokenizer_path)),
        "Mono-InternVL": table_lines(mono.CONFIG_FIELDS, mono_document(tokenizer_path)),
    }
    lines = [
        "# Fields of released configurations",
        "",
        "What `convert from-hf` does with each field of a released config.json, and whether `convert to-hf` writes it. A field that is in",
        "no table is named in a warning. Tests compare this page with the tables in `families/*/files.py`;",
        "`python tests/conversion/test_config_fields.py TOKENIZER.model` writes it anew.",
    ]
    for title, table in parts.items():
        lines += ["", f"## {title}", "", *table]
    return "\n".join(lines) + "\n"


def test_the_page_is_that_of_the_tables(tokenizer_path: Path) -> None:
    assert DOCS.read_text() == page(tokenizer_path)


if __name__ == "__main__":
    import sys

    DOCS.write_text(page(Path(sys.argv[1])))
