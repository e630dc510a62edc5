"""Sources that are damaged, malicious or of another model are found before anything is written, with an exact error."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.hf_models import DECODER, experiment, make_language, make_vision, save

from megatron_mm.conversion.files import read_safetensors_header
from megatron_mm.conversion.from_hf import convert_from_hf
from megatron_mm.conversion.hf_reader import HfReader
from megatron_mm.run.start import check


@pytest.fixture(scope="module")
def whole_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_language(), tmp_path_factory.mktemp("llama"), max_shard_size="100KB")


@pytest.fixture
def llama(whole_llama: Path, tmp_path: Path) -> Path:
    """A sharded checkpoint to damage."""
    return Path(shutil.copytree(whole_llama, tmp_path / "llama"))


def refused(source: Path, tmp_path: Path, **options: Any) -> str:
    """Return the error of a conversion that must fail without writing anything."""
    with pytest.raises(ValueError) as error:
        convert_from_hf(options.pop("settings", experiment()), tmp_path / "run", **{"language": source, **options})
    left = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert left == []
    return str(error.value)


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_shard(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Replace, add or remove a tensor of a sharded checkpoint, and update its index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"].get(name, min(index["weight_map"].values()))
    tensors = load_file(file)
    tensors.pop(name, None)
    index["weight_map"].pop(name, None)
    if tensor is not None:
        tensors[name], index["weight_map"][name] = tensor, file.name
    save_file(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", ".."])
def test_an_index_must_stay_in_its_directory(llama: Path, tmp_path: Path, name: str) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "outside.safetensors")
    index = json.loads((llama / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = name
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"names the file {name!r}, which is outside its own folder" in refused(llama, tmp_path)


def test_a_missing_file_and_a_cut_off_one(llama: Path, tmp_path: Path) -> None:
    last = sorted(llama.glob("*.safetensors"))[-1]
    data = last.read_bytes()
    last.write_bytes(data[:-10])
    assert f"{last} has {len(data) - 10} bytes, but its tensors end at byte {len(data)}: it is truncated" in refused(llama, tmp_path)
    last.write_bytes(data[:20])
    assert "not a safetensors file, or is truncated" in refused(llama, tmp_path)
    last.write_bytes(data + b"more")
    assert "it is too long" in refused(llama, tmp_path)
    last.unlink()
    assert f"names the file {last.name}, which does not exist" in refused(llama, tmp_path)


def test_index_and_files_must_agree(llama: Path, tmp_path: Path) -> None:
    index = json.loads((llama / "model.safetensors.index.json").read_text())
    file = index["weight_map"].pop("model.norm.weight")
    index["weight_map"]["model.other.weight"] = file
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refused(llama, tmp_path)
    assert "1 tensors are in no file (model.other.weight)" in message and "1 are not in the index (model.norm.weight)" in message


def test_an_index_that_names_another_file(llama: Path, tmp_path: Path) -> None:
    index = json.loads((llama / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    right = index["weight_map"]["model.norm.weight"]
    wrong = next(file for file in files if file != right)
    index["weight_map"]["model.norm.weight"] = wrong
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"does not match its files: (model.norm.weight is in {right}, not in {wrong}): download it again" in refused(llama, tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float8_e4m3fn])
def test_quantised_weights_are_no_weights_to_train(llama: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    edit_shard(llama, name, torch.ones(64, 96).to(dtype))
    said = f"{llama} has 1 weights of a type that training does not support: {name} ({str(dtype).removeprefix('torch.')})"
    assert said in refused(llama, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite_are_named(llama: Path, tmp_path: Path, value: float) -> None:
    tensor = torch.ones(64, 96)
    tensor[3, 5] = value
    edit_shard(llama, "model.layers.2.mlp.down_proj.weight", tensor)
    with pytest.raises(ValueError, match=r"down_proj.weight has 1 of 6144 values that are not finite: download it again"):
        convert_from_hf(experiment(), tmp_path / "run", language=llama)
    assert not (tmp_path / "run" / "checkpoints" / "step_00000000").exists()


def test_a_model_without_the_tensor_by_which_it_is_known(llama: Path, tmp_path: Path) -> None:
    """config.json determines the format, so the error names the missing tensor."""
    edit_shard(llama, "model.layers.0.self_attn.q_proj.weight", None)
    assert f"{llama} lacks 1 tensors: model.layers.0.self_attn.q_proj.weight" in refused(llama, tmp_path)
    edit_json(llama / "config.json", model_type="other")
    assert "is not in a format that --language reads" in refused(llama, tmp_path)


def test_a_tensor_in_two_files_is_named(llama: Path, tmp_path: Path) -> None:
    first, second = sorted(llama.glob("*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    save_file({**load_file(second), name: load_file(first)[name]}, second)
    assert f"holds 1 tensors in more than one file: ({name})" in refused(llama, tmp_path)


def test_one_error_lists_all_that_is_missing_unknown_and_of_another_shape(llama: Path, tmp_path: Path) -> None:
    edit_shard(llama, "model.layers.1.mlp.up_proj.weight", None)
    edit_shard(llama, "model.layers.2.self_attn.q_proj.bias", torch.ones(128))
    edit_shard(llama, "model.layers.3.mlp.down_proj.weight", torch.ones(64, 95))
    edit_shard(llama, "model.layers.0.self_attn.k_proj.weight", torch.ones(32, 64))
    message = refused(llama, tmp_path)
    assert f"{llama} lacks 1 tensors: model.layers.1.mlp.up_proj.weight" in message
    assert "has 1 unknown tensors: model.layers.2.self_attn.q_proj.bias" in message
    assert "model.layers.3.mlp.down_proj.weight should be [64, 96], but is [64, 95]" in message
    assert "model.layers.0.self_attn.k_proj.weight should be [64, 64], but is [32, 64]" in message


def test_too_many_tokens_for_the_recipe(llama: Path, tmp_path: Path) -> None:
    message = refused(llama, tmp_path, settings=experiment(vocab_size=384))
    assert "model.embed_tokens.weight should be [384, 64], but is [400, 64]" in message
    assert "use --model.decoder.vocab-size 400 or more" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, "its config.json says model_type 'gemma', which is a different architecture"),
        (
            {"num_attention_heads": 4, "head_dim": 32},
            "num_attention_heads is 4 there and 8 in the recipe (--model.decoder.num-attention-heads",
        ),
        ({"rms_norm_eps": 1e-6}, "norm_epsilon is 1e-06 there and 1e-05 in the recipe (--model.decoder.norm-epsilon 1e-06)"),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, "rotary_base is 1000000.0 there and 500.0 in the recipe"),
        (
            {"rope_parameters": {"rope_theta": 500.0, "rope_type": "llama3", "factor": 8.0}},
            "config.json: the language model has {'rope_parameters': {",
        ),
        ({"attention_bias": True}, "config.json: it describes a different model: attention_bias is True, but our model computes False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', but our model computes 'silu' or 'swish'"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers is '4', but must be a whole number"),
        ({"rope_parameters": [1]}, "rope_parameters is [1], but must be an object"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_parameters.rope_theta is 'x', but must be a number"),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 500.0}},
            "contradicts itself: rope_theta is 10000.0, but in rope_parameters",
        ),
    ],
)
def test_another_computation_under_the_same_names(llama: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    edit_json(llama / "config.json", **change)
    assert message in refused(llama, tmp_path)


def test_an_output_layer_of_its_own_is_not_dropped(llama: Path, tmp_path: Path) -> None:
    message = refused(llama, tmp_path, settings=experiment(tied_embeddings=True))
    assert "has a separate output layer, but the recipe ties it to the embeddings: use --model.decoder.no-tied-embeddings" in message


def test_a_source_of_another_part(llama: Path, tmp_path: Path) -> None:
    vision = save(make_vision(), tmp_path / "vision")
    assert "of format llama, which is read with --language, not with --vision" in refused(llama, tmp_path, language=None, vision=llama)
    assert "of format clip, which is read with --vision, not with --whole" in refused(llama, tmp_path, language=None, whole=vision)
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    assert "is not in a format that --language reads (llama, internlm2" in refused(tmp_path / "x.safetensors", tmp_path)
    assert "use --whole DIR, or --language DIR, --vision DIR or both" in refused(llama, tmp_path, whole=vision)
    (tmp_path / "empty").mkdir()
    assert "holds no weights: looked for model.safetensors.index.json" in refused(tmp_path / "empty", tmp_path)
    assert "does not exist: specify a Hugging Face directory" in refused(tmp_path / "nowhere", tmp_path)


def header(document: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(document)) + document + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', bytes(8)),
         "names a more than once"),
        (header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', bytes(8)),
         "tensor b begins at byte .*, but the one before it ends at"),
        (header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', bytes(8)), "tensor a begins at byte"),
        (header(b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', bytes(8)), r"tensor a of shape \[3\] takes 12 bytes, but has 8"),
        (header(b'{"a":{"dtype":"F32","shape":[-1,-2],"data_offsets":[0,8]}}', bytes(8)), r"tensor a of shape \[-1, -2\]"),
        (header(b'{"a":{"dtype":"Q4","shape":[1],"data_offsets":[0,4]}}', bytes(4)), "tensor a has the type Q4"),
        (header(b'{"a":{"dtype":"F32"}}'), "has a safetensors header that cannot be read"),
        (header(b'["a"]'), "has a safetensors header that cannot be read"),
        (header(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'), r"takes 7378\d+ bytes, but has 0"),
        (header(b"[" * 100_000), "has a safetensors header that cannot be read"),
        (header(b"{}  not json"), "has a safetensors header that cannot be read"),
        (struct.pack("<Q", 2**60) + b"{}", "its header of 1152921504606846976 bytes is longer than the"),
    ],
)  # fmt: skip
def test_headers_that_lie(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_safetensors_header(tmp_path / "x.safetensors")


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_runs_nothing(llama: Path, tmp_path: Path, zipped: bool) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    file = folder / "pytorch_model.bin"
    if zipped:
        torch.save({"model.norm.weight": torch.ones(1), "x": Payload(tmp_path / "ran")}, file)
    else:
        file.write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    assert "cannot be read as a file that contains only tensors" in refused(folder, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_pickled_shards_give_the_same_tensors_and_safetensors_come_first(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    index: dict[str, dict[str, str]] = {"weight_map": {}}
    for number, file in enumerate(sorted(llama.glob("*.safetensors"))):
        tensors = load_file(file)
        torch.save(tensors, folder / f"pytorch_model-{number}.bin")
        index["weight_map"].update(dict.fromkeys(tensors, f"pytorch_model-{number}.bin"))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    pickled, plain = HfReader(folder), HfReader(llama)
    assert pickled.names() == plain.names() and all(torch.equal(pickled.read(name), plain.read(name)) for name in plain.names())
    shutil.copyfile(folder / "pytorch_model.bin.index.json", llama / "pytorch_model.bin.index.json")
    assert all(file.suffix == ".safetensors" for file in HfReader(llama).files)


def test_code_beside_the_weights_is_not_run(llama: Path, tmp_path: Path) -> None:
    edit_json(llama / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (llama / "evil.py").write_text("raise SystemExit('this code must not run')")
    assert convert_from_hf(experiment(), tmp_path / "run", language=llama).sources


def test_weights_alone_are_no_run_to_go_on_with(whole_llama: Path, tmp_path: Path, demo_data: Path) -> None:
    settings = experiment(vocab_size=512)
    settings = replace(settings, data=replace(settings.data, path=demo_data))
    convert_from_hf(settings, tmp_path / "run", language=whole_llama)
    with pytest.raises(ValueError, match="has only weights and cannot be resumed: use another --run-dir and --init-from"):
        check(settings, tmp_path / "run")
    with pytest.raises(ValueError, match="has checkpoints already"):
        convert_from_hf(settings, tmp_path / "run", language=whole_llama)


def test_a_tokenizer_with_more_tokens_than_the_model(whole_llama: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    """DECODER's vocabulary has exactly the tokenizer's size; a smaller recipe is refused because of its weights first."""
    folder = Path(shutil.copytree(whole_llama, tmp_path / "llama"))
    shutil.copyfile(tokenizer_path, folder / "tokenizer.model")
    made = convert_from_hf(experiment(), tmp_path / "good", language=folder)
    assert (made.checkpoint / "tokenizer.model").read_bytes() == tokenizer_path.read_bytes()
    (folder / "tokenizer.model").write_bytes(b"no model")
    assert "is not a SentencePiece model" in refused(folder, tmp_path)
    assert DECODER["vocab_size"] == 400
