"""Released configurations: fields that change the computation are refused, unknown ones are reported, others survive a round trip."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import megatron_mm
from megatron_mm.config import Experiment
from megatron_mm.conversion.hf_reader import HfReader
from megatron_mm.conversion.sources import _check_images, _check_settings
from megatron_mm.data.text.tokenizer import Tokenizer
from megatron_mm.families.infimm import files as infimm
from megatron_mm.families.mm1 import files as mm1
from megatron_mm.families.mono_internvl import files as mono
from megatron_mm.families.recipes import get_recipe
from megatron_mm.families.registry import family_of
from megatron_mm.hf.configs import language_model_config, vision_model_config
from megatron_mm.hf.field_tables import CLIP_FIELDS, DECODER_FIELDS, EVA_FIELDS, EXPERT_FIELDS, EXPORTED_ALONE, OPEN_CLIP_FIELDS
from megatron_mm.hf.fields import ConfigField, table_lines, unknown_fields
from megatron_mm.hf.settings import clip_settings, decoder_settings, eva_settings, open_clip_settings

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
    recipe = with_positions(get_recipe(name))
    return recipe.model, recipe, Tokenizer.open(tokenizer_path, special=family_of(recipe.model).special_tokens)


def with_positions(recipe: Experiment) -> Experiment:
    """Return a recipe whose decoder has `max_positions`, which is not published for MM1."""
    decoder = recipe.model.decoder
    return replace(recipe, model=replace(recipe.model, decoder=replace(decoder, max_positions=decoder.max_positions or 4096)))


def mm1_document(tokenizer_path: Path, name: str = "mm1_3b_moe") -> dict[str, Any]:
    model, recipe, ids = of_recipe(name, tokenizer_path)
    return mm1.hf_config(model, dtype="bfloat16", ids=ids, sequence_length=recipe.data.sequence_length)


def infimm_document(tokenizer_path: Path, name: str = "infimm_zephyr_7b_ift") -> dict[str, Any]:
    model, recipe, ids = of_recipe(name, tokenizer_path)
    length = recipe.data.sequence_length
    return infimm.infimm_config(model, ids, sequence_length=length, language_is_frozen=True, dtype="bfloat16", vocab_rows=None)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("ps_version", "v1", "ps_version is 'v1', but our model computes 'v2'"),
        ("ps_version", None, "ps_version is 'v1'"),  # the default in the authors' code
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
    assert "unknown fields, which are ignored: media_time_embedding" in caplog.text


def test_what_is_written_is_read(tokenizer_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for name in ("infimm_zephyr_7b_pt", "infimm_llama_13b_ift", "infimm_vicuna_13b_mtt"):
            settings = infimm.infimm_settings(infimm_document(tokenizer_path, name))
            assert_equal(settings, get_recipe(name).model)
        assert_equal(mono.mono_internvl_settings(mono_document(tokenizer_path)), get_recipe("mono_internvl_2b_s2").model)
        for name in ("mm1_3b_moe", "mm1_30b", "mm1_ablation_average_64"):
            _check_settings(
                mm1.mm1_settings(mm1_document(tokenizer_path, name)), with_positions(get_recipe(name)).model, where=name, group=""
            )
    assert not caplog.text


def assert_equal(settings: dict[str, Any], model: Any) -> None:
    for name, value in settings.items():
        part, field = name.split(".")
        assert getattr(getattr(model, part), field) == value, name


def test_lengths_are_the_decoder_s(tokenizer_path: Path) -> None:
    """Not the lengths of training sequences, which are 512 and 8192 here."""
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
    smaller = replace(zephyr, vision=replace(zephyr.vision, image_size=224))  # type: ignore[attr-defined, call-arg]
    assert not infimm.fits_authors_code(smaller), "their processor has the side of images as a constant"  # type: ignore[arg-type]


def test_what_the_authors_code_asks_for(tokenizer_path: Path, tmp_path: Path) -> None:
    """Files that name only its classes: if ours were next to them, the authors' quickstart would use our processor. Their slow tokenizer
    reads tokenizer.model, which has no image tokens."""
    recipe = get_recipe("infimm_zephyr_7b_ift")
    recipe = replace(recipe, data=replace(recipe.data, chat_template="zephyr"))
    ids = Tokenizer.open(tokenizer_path, special=family_of(recipe.model).special_tokens)
    family_of(recipe.model).write_files(recipe.model, tmp_path, experiment=recipe, tokenizer=tokenizer_path, dtype="bfloat16")
    found = {path.name: json.loads(path.read_text()) for path in (tmp_path / "authors_code").iterdir()}
    assert set(found) == {"config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"}
    assert all(
        "processing_infimm." not in json.dumps(document) and "modeling_infimm." not in json.dumps(document) for document in found.values()
    )
    added = {entry["content"]: int(index) for index, entry in found["tokenizer_config.json"]["added_tokens_decoder"].items()}
    assert added == {name: ids.special_id(name) for name in ("<s>", "</s>", "<|endofchunk|>", "<image>")}
    assert (
        found["tokenizer_config.json"]["tokenizer_class"] == "LlamaTokenizer"
        and "<|user|>" in found["tokenizer_config.json"]["chat_template"]
    )
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    assert all(isinstance(merge, str) for merge in document["model"]["merges"]), "tokenizers of transformers 4.37 reads nothing else"


OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 1024,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 378, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
        "text_cfg": {"context_length": 77},
    },
    "preprocess_cfg": {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711], "resize_mode": "squash"},
}
"""Published configuration of DFN5B's ViT-H/14 at 378 px."""


def described(tokenizer_path: Path) -> dict[str, tuple[dict[str, Any], tuple[ConfigField, ...], Callable[..., dict[str, Any]], Any, str]]:
    """Return, for each kind of document that from-hf reads: an accepted document, its table, its reader, the part of the recipe that it
    describes, and the prefix of its fields."""
    zephyr, mm1_3b, moe = (with_positions(get_recipe(name)).model for name in ("infimm_zephyr_7b_ift", "mm1_3b", "mm1_3b_moe"))
    language = language_model_config(zephyr.decoder, architecture="mistral", dtype="bfloat16", sequence_length=512, vocab_rows=None)
    infimm_whole, mono_model = infimm_document(tokenizer_path), get_recipe("mono_internvl_2b_s2").model
    eva = {"embed_dim": 768, "vision_cfg": {name: value for name, value in infimm_whole["visual"].items() if name != "embed_dim"}}
    tower = vision_model_config(mm1_3b.vision, dtype="bfloat16")  # type: ignore[attr-defined]
    return {
        "MM1": (mm1_document(tokenizer_path), mm1.CONFIG_FIELDS, mm1.mm1_settings, moe, ""),
        "InfiMM": (infimm_whole, infimm.CONFIG_FIELDS, infimm.infimm_settings, zephyr, ""),
        "Mono-InternVL": (mono_document(tokenizer_path), mono.CONFIG_FIELDS, mono.mono_internvl_settings, mono_model, ""),
        "Decoder": (language, DECODER_FIELDS, decoder_settings, zephyr.decoder, ""),
        "CLIP": (tower, CLIP_FIELDS, clip_settings, mm1_3b.vision, ""),  # type: ignore[attr-defined]
        "open_clip": (OPEN_CLIP, OPEN_CLIP_FIELDS, open_clip_settings, mm1_3b.vision, "model_cfg."),  # type: ignore[attr-defined]
        "EVA-CLIP": (eva, EVA_FIELDS, eva_settings, zephyr.vision, "vision_cfg."),  # type: ignore[attr-defined]
    }


@pytest.fixture(scope="module")
def all_described(tokenizer_path: Path) -> Any:
    return described(tokenizer_path)


NAMES = ("MM1", "InfiMM", "Mono-InternVL", "Decoder", "CLIP", "open_clip", "EVA-CLIP")
SEVERAL = {"num_key_value_heads": 3, "head_dim": 48, "rope_theta": 77.0, "head_width": 32, "mlp_ratio": 3.0, "norm_kwargs": {"eps": 0.1},
           "subln": False, "intp_freq": False, "rope_scaling": {"type": "linear", "factor": 2.0}, "pt_hw_seq_len": 8,
           "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0}}  # fmt: skip
"""Fields that change the computation, with values that no recipe here has."""


def other(field: ConfigField, given: Any) -> Any:
    """Return another value of the same type as a field's."""
    value = field.default if given is None else given
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 + 3
    if isinstance(value, list | tuple):
        return ["another"] if value and isinstance(value[0], str) else [*value, 0]
    return "another" if isinstance(value, str) else 3


def changed(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    name, _, rest = path.partition(".")
    return {**document, name: changed(document.get(name) or {}, rest, value) if rest else value}


def found_in(document: Any, path: str) -> Any:
    for name in path.split("."):
        document = document.get(name) if isinstance(document, dict) else None
    return document


def check_document(document: dict[str, Any], case: Any) -> None:
    _, _, read, ours, _ = case
    _check_settings(read(document), ours, where="config.json", group="")


@pytest.mark.parametrize("name", NAMES)
def test_every_field_that_changes_the_computation_is_checked(name: str, all_described: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Each field of the table in turn gets another value: this must be an error, or the field must have a note that explains why not."""
    case = all_described[name]
    document, table, _, _, part = case
    with caplog.at_level(logging.WARNING):
        check_document(document, case)
    assert "unknown fields" not in caplog.text
    accepted = []
    for field in (field for field in table if not field.path.endswith(".*")):
        last = field.path.rpartition(".")[2]
        path = field.path if name == "EVA-CLIP" and last == "embed_dim" else f"{part}{field.path}"
        value = SEVERAL.get(last, other(field, found_in(document, path)))
        caplog.clear()
        try:
            with caplog.at_level(logging.WARNING):
                check_document(changed(document, path, value), case)
        except ValueError as error:
            assert last in str(error) or field.read or field.note, f"{field.path}: {error}"
            continue
        if field.read.rpartition(".")[2] in EXPORTED_ALONE:
            assert f"{field.read} is" in caplog.text, field.path
            continue
        accepted.append(last)
        assert not field.read, f"{field.path} is read, but any value will do"
        assert not field.must_be, f"{field.path} must be one of {field.must_be}, but any value will do"
        assert field.note, f"{field.path}: why is it not checked?"
    assert not set(accepted) & (SEVERAL.keys() - {"pt_hw_seq_len"}), accepted


@pytest.mark.parametrize("name", NAMES)
def test_a_field_of_another_type_is_named(name: str, all_described: Any) -> None:
    case = all_described[name]
    document, table, _, _, part = case
    for field in table:
        if field.kind is None:
            continue
        path = field.path if name == "EVA-CLIP" and field.path == "embed_dim" else f"{part}{field.path}"
        wrong: Any = "24" if field.kind is not str else 24
        with pytest.raises((ValueError, TypeError), match=rf"{field.path} is '?24'?, but must be "):
            check_document(changed(document, path, wrong), case)


def test_nothing_of_the_released_code_is_unknown(tokenizer_path: Path) -> None:
    """Every field of the configuration classes is in a table: transformers' classes are imported, the authors' fields are listed here."""
    from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig

    for config, table in ((LlamaConfig(), DECODER_FIELDS), (MistralConfig(), DECODER_FIELDS), (CLIPVisionConfig(), CLIP_FIELDS)):
        assert unknown_fields(config.to_dict(), table) == [], type(config).__name__
    internlm2 = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act " \
        "max_position_embeddings rms_norm_eps bias rope_theta rope_scaling attn_implementation tie_word_embeddings"  # fmt: skip
    assert unknown_fields(dict.fromkeys(internlm2.split()), DECODER_FIELDS) == []
    eva = "layers width head_width mlp_ratio patch_size image_size ls_init_value patch_dropout global_average_pool drop_path_rate " \
        "timm_model_name eva_model_name qkv_bias fusedLN embed_dim xattn postnorm rope pt_hw_seq_len " \
        "intp_freq naiveswiglu subln"  # fmt: skip
    assert unknown_fields(dict.fromkeys(eva.split()), EVA_FIELDS) == []
    chat = "use_backbone_lora use_llm_lora pad2square select_layer force_image_size downsample_ratio template dynamic_image_size " \
        "use_thumbnail ps_version min_dynamic_patch max_dynamic_patch"  # fmt: skip
    assert unknown_fields(dict.fromkeys(chat.split()), mono.CONFIG_FIELDS) == []


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}, r"vision.mean|mean is \(0.5, 0.5, 0.5\) there and"),
        ("preprocessor_config.json", {"image_std": "1"}, "image_std is '1', but must be three numbers"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize False, but training has True"),
        ("preprocessor_config.json", {"rescale_factor": 1}, "rescale_factor 1.0, but pixels are divided by 255"),
        ("preprocessor_config.json", {"resample": 2}, "resample 2, but training has 3"),
        ("open_clip_config.json", {"std": [1.0, 1.0, 1.0]}, r"std is \(1.0, 1.0, 1.0\) there and .*--model.vision.std 1.0 1.0 1.0\)"),
        ("open_clip_config.json", {"interpolation": "bilinear"}, "interpolation is 'bilinear', but images are resized bicubically"),
        ("open_clip_config.json", {"resize_mode": "fit"}, r"resize_mode is 'fit', but must be one of \['longest', 'shortest', 'squash'\]"),
    ],
)
def test_images_that_are_prepared_otherwise(file: str, change: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        check_images(tmp_path, file, change)


@pytest.mark.parametrize(
    ("file", "change", "resize"),
    [
        ("preprocessor_config.json", {}, "crop"),  # OpenAI's
        ("preprocessor_config.json", {"size": 224}, "crop"),
        ("preprocessor_config.json", {"size": {"height": 224, "width": 224}, "do_center_crop": False}, "squash"),
        ("preprocessor_config.json", {"resize": "pad"}, "pad"),  # of an exported MM1
        ("open_clip_config.json", {}, "crop"),
        ("open_clip_config.json", {"resize_mode": "squash"}, "squash"),  # DFN5B
        ("open_clip_config.json", {"resize_mode": "longest"}, "pad"),
    ],
)
def test_another_way_to_make_images_square_is_said(
    file: str, change: dict[str, Any], resize: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check_images(tmp_path, file, change)
    said = f"resize is {resize} there and squash in the recipe (--model.vision.resize {resize})"
    assert (said in caplog.text) == (resize != "squash") and ("WARNING" in caplog.text) == (resize != "squash")


def check_images(folder: Path, file: str, change: dict[str, Any]) -> None:
    """Check a description of images as open_source does, for the tower of mm1_3b."""
    if file == "open_clip_config.json":
        document = {**OPEN_CLIP, "preprocess_cfg": {"mean": OPEN_CLIP["preprocess_cfg"]["mean"], **change}}
    else:
        colours = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
        document = {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 224},
            "do_center_crop": True,
            **colours,
            **change,
        }
    (folder / file).write_text(json.dumps(document))
    save_file({"x": torch.ones(1)}, folder / "model.safetensors")
    _check_images(HfReader(folder), get_recipe("mm1_3b").model)


def collapsed(fields: tuple[ConfigField, ...], shared: dict[str, str]) -> list[ConfigField]:
    """Return a family's table with one row for each part that has a table of its own."""
    found = [field for field in fields if not field.path.startswith(tuple(f"{part}." for part in shared)) or field.path.endswith(".*")]
    return [*found, *(ConfigField(f"{part}.*", note=note) for part, note in shared.items())]


def page(tokenizer_path: Path) -> str:
    """Return the text of docs/config_fields.md."""
    cases = described(tokenizer_path)
    shared = {
        "MM1": {"vision_config": "as for a CLIP tower", "text_config": "as for a decoder, with experts"},
        "InfiMM": {"visual": "as for an EVA-CLIP tower", "language": "as for a decoder"},
        "Mono-InternVL": {"llm_config": "as for a decoder; architectures must be InternLM2VEForCausalLM"},
    }
    tables = {name: table_lines(collapsed(cases[name][1], shared.get(name, {})), _written(name, cases[name][0])) for name in NAMES}
    experts = table_lines(EXPERT_FIELDS, mm1_document(tokenizer_path)["text_config"])
    titles = {
        "Decoder": "Decoders: Llama, Mistral, InternLM2",
        "CLIP": "CLIP towers of transformers",
        "open_clip": "CLIP towers of open_clip: `model_cfg` of open_clip_config.json",
        "EVA-CLIP": "EVA-CLIP towers: `vision_cfg` of eva_config.json",
    }
    lines = [
        "# Fields of released configurations",
        "",
        "How `convert from-hf` handles each field of a released config.json, and whether `convert to-hf` writes it. It is an error if",
        "a value has another type, or if the recipe's model does not compute it. A field that is in no table is named in a warning, and so",
        f"is a different value of a field that does not change training ({', '.join(f'`{name}`' for name in sorted(EXPORTED_ALONE))}).",
        "Tests change every field in turn, and compare this page with the tables in `families/*/files.py` and `hf/field_tables.py`.",
        "`python tests/conversion/test_config_fields.py TOKENIZER.model` writes this page.",
        "",
        "Files that describe how images are prepared are checked as well (`hf/preprocessing.py`). `image_mean`, `image_std`,",
        "`do_normalize`, `do_rescale`, `rescale_factor` and `resample` in preprocessor_config.json must match the recipe, and so must",
        "`preprocess_cfg.mean`, `.std` and `.interpolation` in open_clip_config.json. A different way of making images square (`size` and",
        "`do_center_crop`, or `resize_mode`) is named in a warning.",
    ]
    for name, table in tables.items():
        lines += ["", f"## {titles.get(name, name)}", "", *table]
        if name == "Decoder":
            lines += ["", "With experts (only MM1):", "", *experts]
    return "\n".join(lines) + "\n"


def _written(name: str, document: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that an export writes; there is no export to open_clip or EVA-CLIP alone."""
    return {} if name == "open_clip" else {**document["vision_cfg"], "embed_dim": 0} if name == "EVA-CLIP" else document


def test_the_page_is_that_of_the_tables(tokenizer_path: Path) -> None:
    assert DOCS.read_text() == page(tokenizer_path)


if __name__ == "__main__":
    import sys

    DOCS.write_text(page(Path(sys.argv[1])))
