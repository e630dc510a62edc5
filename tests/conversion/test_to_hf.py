"""The export of a checkpoint is complete, exact and sharded, or fails with a precise error."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from safetensors import safe_open
from safetensors.torch import load_file
from support.trained import Trained, train_one_step
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from megatron_mm.conversion.files import TensorInfo
from megatron_mm.conversion.from_hf import convert_from_hf
from megatron_mm.conversion.reader import CheckpointReader
from megatron_mm.conversion.to_hf import Export, convert_to_hf, parse_size, plan_shards, plan_tensors
from megatron_mm.families.mm1.config import MM1Config
from megatron_mm.families.mm1.files import write_mm1_files
from megatron_mm.families.mm1.names import mm1_table
from megatron_mm.families.recipes import get_recipe
from megatron_mm.families.registry import family_of
from megatron_mm.families.serialize import load_experiment, save_experiment
from megatron_mm.hf.decoder_variants import DECODER_VARIANTS, DecoderVariant, ModelingCode
from megatron_mm.hf.mapping import Direct, to_hf
from megatron_mm.models.layers import norm_module


def read_all(out: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(out.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture
def copy(trained: Trained, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(trained.checkpoint, tmp_path / "run" / "checkpoints" / "step_00000001"))


class ThreeNorms(TransformerLayer):
    """A layer with a norm after its MLP."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.post_mlp_layernorm = norm_module("torch")(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)


def with_a_third_norm(spec: ModuleSpec, backend: str) -> ModuleSpec:
    return replace(spec, module=ThreeNorms)


def edit_model(checkpoint: Path, **decoder: Any) -> None:
    experiment = load_experiment(checkpoint / "experiment.json")
    assert isinstance(experiment.model, MM1Config)
    model = replace(experiment.model, decoder=replace(experiment.model.decoder, **decoder))
    save_experiment(replace(experiment, model=model), checkpoint / "experiment.json")


def test_reader_sees_the_model_and_nothing_else(trained: Trained) -> None:
    reader, weights = CheckpointReader(trained.checkpoint), trained.weights
    assert reader.names().keys() == weights.keys()
    for name, info in reader.names().items():
        assert info.shape == tuple(weights[name].shape)
        assert torch.equal(reader.read(name), weights[name]), name


def test_exported_weights_are_the_models(trained: Trained, exported: Export) -> None:
    expected = to_hf(mm1_table(trained.config), trained.weights)
    written = read_all(exported.path)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert exported.num_parameters == sum(t.numel() for t in written.values())
    assert exported.num_tensors == len(written)


def test_shards_and_their_index(exported: Export) -> None:
    files = sorted(exported.path.glob("*.safetensors"))
    index = json.loads((exported.path / "model.safetensors.index.json").read_text())
    assert [file.name for file in files] == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) == exported.num_shards > 2
    content = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            content.update(dict.fromkeys(opened.keys(), file.name))
        assert file.stat().st_size <= 500_000 + 20_000  # plus the header
    assert index["weight_map"] == content
    assert index["metadata"]["total_size"] == exported.num_bytes


def test_one_shard_has_no_index(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    export = convert_to_hf(trained.checkpoint, out, dtype="bfloat16", verify=False)
    assert export.num_shards == 1
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]
    expected = to_hf(mm1_table(trained.config), trained.weights)
    assert all(torch.equal(t, expected[name].bfloat16()) for name, t in read_all(out).items())
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_run_directory_means_its_newest_checkpoint(copy: Path, tmp_path: Path) -> None:
    export = convert_to_hf(copy.parent.parent, tmp_path / "out", verify=False)
    assert export.num_tensors > 0
    with pytest.raises(ValueError, match="neither a complete checkpoint nor a run directory"):
        (copy / "manifest.json").unlink()
        convert_to_hf(copy.parent.parent, tmp_path / "again")


def test_a_tensor_larger_than_a_shard_is_alone(trained: Trained) -> None:
    plan = plan_tensors(mm1_table(trained.config), CheckpointReader(trained.checkpoint, verify=False).names(), dtype=torch.float16)
    shards = plan_shards(plan, limit=1)
    assert shards == [[written] for written in plan]


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2**31), ("700", 700)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 apples"])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="shard_size"):
        parse_size(text)


def test_bad_arguments_are_refused(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        convert_to_hf(trained.checkpoint, tmp_path / "out", dtype="int8")
    with pytest.raises(ValueError, match="neither a complete checkpoint nor a run directory"):
        convert_to_hf(tmp_path, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="not an empty directory"):
        convert_to_hf(trained.checkpoint, tmp_path / "full")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("manifest.json", "neither a complete checkpoint nor a run directory"),
        ("tokenizer.model", "no tokenizer.model"),
        ("tensors/.metadata", "missing"),
    ],
)
def test_missing_files_are_named(copy: Path, tmp_path: Path, name: str, message: str) -> None:
    (copy / name).unlink()
    with pytest.raises(ValueError, match=message):
        convert_to_hf(copy, tmp_path / "out")


def test_a_flipped_byte_is_found(copy: Path, tmp_path: Path) -> None:
    path = next((copy / "tensors").glob("*.distcp"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{path.name} is damaged \(its CRC-32 is [0-9a-f]{{8}}, expected [0-9a-f]{{8}}\): restore"):
        convert_to_hf(copy, tmp_path / "out")


def test_tensors_of_another_model_are_listed(copy: Path, tmp_path: Path) -> None:
    edit_model(copy, num_layers=4)
    with pytest.raises(ValueError, match=r"6 tensors are missing \(language.decoder.layers.3.input_layernorm.weight, "):
        convert_to_hf(copy, tmp_path / "out", verify=False)
    edit_model(copy, num_layers=2)
    with pytest.raises(ValueError, match=r"6 are unknown \(language.decoder.layers.2.input_layernorm.weight, "):
        convert_to_hf(copy, tmp_path / "out", verify=False)
    edit_model(copy, num_layers=3, num_query_groups=4)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attention\.linear_qkv\.weight should be \[384, 128\], but is \[256, 128\]"):
        convert_to_hf(copy, tmp_path / "out", verify=False)


def test_a_failed_export_leaves_nothing(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CheckpointReader, "read", lambda self, name, row: torch.empty(0).view(-1, 3)[5])
    with pytest.raises(IndexError):
        convert_to_hf(trained.checkpoint, tmp_path / "out", verify=False)
    assert list(tmp_path.iterdir()) == []


def test_too_small_an_embedding_table_is_refused(trained: Trained, tmp_path: Path) -> None:
    """Because the tokenizer belongs to another run, or too many rows are cut off."""
    with pytest.raises(ValueError, match="ids, but only 300 embeddings are written"):
        write_mm1_files(
            trained.config,
            tmp_path,
            experiment=trained.experiment,
            tokenizer=trained.checkpoint / "tokenizer.model",
            dtype="float32",
            vocab_rows=300,
        )
    with pytest.raises(ValueError, match="--vocab-size is 300, but the checkpoint's tokenizer has 400 tokens"):
        convert_to_hf(trained.checkpoint, tmp_path / "out", vocab_rows=300, verify=False)
    with pytest.raises(ValueError, match="--vocab-size is 513, but the model has only 512 rows"):
        convert_to_hf(trained.checkpoint, tmp_path / "out", vocab_rows=513, verify=False)


def test_values_that_float16_cannot_hold_are_named(tokenizer_path: Path, tmp_path: Path) -> None:
    def enlarge(module: torch.nn.Module) -> None:
        with torch.no_grad():
            dict(module.named_parameters())["language.decoder.layers.1.mlp.linear_fc2.weight"][3, 5] = 1e5

    large = train_one_step(tokenizer_path, tmp_path / "run", change=enlarge)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight has values that float16 cannot hold: use --dtype bfloat16"):
        convert_to_hf(large.checkpoint, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def own_code(folder: Path) -> ModelingCode:
    """Write modeling code of a Llama whose feed-forward outputs are doubled."""
    (folder / "modeling_twice.py").write_text(TWICE)
    auto_map = {"AutoConfig": "modeling_twice.TwiceConfig", "AutoModelForCausalLM": "modeling_twice.TwiceForCausalLM"}
    return ModelingCode((folder / "modeling_twice.py",), "TwiceForCausalLM", auto_map, "twice")


TWICE = """
from transformers import LlamaConfig, LlamaForCausalLM

class TwiceConfig(LlamaConfig):
    model_type = "twice"

class TwiceForCausalLM(LlamaForCausalLM):
    config_class = TwiceConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.register_forward_hook(lambda module, given, made: 2 * made)
"""


class MLPTwice(MLP):
    """A feed-forward network whose output is doubled."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        made, bias = super().forward(*args, **kwargs)
        return 2 * made, bias


def with_mlps_that_count_twice(spec: ModuleSpec, backend: str) -> ModuleSpec:
    mlp: Any = spec.submodules.mlp  # a ModuleSpec in megatron-core 0.16, a function in 0.19
    build: Any = MLPTwice
    twice = partial(build.as_mlp_submodule, **mlp.keywords) if isinstance(mlp, partial) else replace(mlp, module=MLPTwice)
    return replace(spec, submodules=replace(spec.submodules, mlp=twice))


def test_a_decoder_variant_of_other_layers_is_no_llama(tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a Llama's tensors but computes something else: only the decoder with code of its own can be exported."""
    silent = DecoderVariant(layer_spec=with_mlps_that_count_twice)
    monkeypatch.setitem(DECODER_VARIANTS, "twice", silent)
    trained = train_one_step(tokenizer_path, tmp_path / "run", variant="twice")
    for recipe, name in (("debug_mm1", "MM1"), ("debug_infimm", "InfiMM"), ("debug_mono_internvl", "Mono-InternVL")):
        model = get_recipe(recipe).model
        with pytest.raises(ValueError, match=rf"exported {name} computes a Llama, but the decoder variant 'twice' is not one"):
            family_of(model).check_export(replace(model, decoder=replace(model.decoder, variant="twice")))
    with pytest.raises(ValueError, match="computes a Llama, but the decoder variant 'twice' is not one"):
        convert_to_hf(trained.checkpoint, tmp_path / "whole")
    with pytest.raises(ValueError, match=r"Llama cannot compute the decoder variant 'twice': set `DecoderVariant.modeling`"):
        convert_to_hf(trained.checkpoint, tmp_path / "alone", part="language")
    monkeypatch.setitem(DECODER_VARIANTS, "twice", replace(silent, modeling=own_code(tmp_path)))
    convert_to_hf(trained.checkpoint, tmp_path / "alone", part="language", dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "alone", trust_remote_code=True)
    first, last = trained.batch.cu_seqlens[1:3].tolist()
    with torch.no_grad():
        found = theirs(trained.batch.token_ids[None, first:last]).logits[0]
        plain = LlamaForCausalLM.from_pretrained(tmp_path / "alone")(trained.batch.token_ids[None, first:last]).logits[0]
    assert (found - trained.logits[1]).abs().max() < 2e-5 < 1e-2 < (plain - trained.logits[1]).abs().max()
    again = convert_from_hf(trained.experiment, tmp_path / "again", language=tmp_path / "alone")
    assert again.sources["language (llama)"] == sum(parameter.numel() for parameter in theirs.parameters())


def test_a_decoder_variant_with_tensors_of_its_own(trained: Trained, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of whole models does not know them; the decoder alone is exported with all of them, or not at all."""
    norm = "post_mlp_layernorm.weight"
    forgets = DecoderVariant(layer_spec=with_a_third_norm)
    complete = replace(forgets, entries=lambda ours, theirs: [Direct(f"{ours}.{norm}", f"{theirs}.{norm}")])
    monkeypatch.setitem(DECODER_VARIANTS, "three_norms", complete)
    for recipe, name in (("debug_mm1", "MM1"), ("debug_infimm", "InfiMM"), ("debug_mono_internvl", "Mono-InternVL")):
        model = get_recipe(recipe).model
        family_of(model).check_export(model)
        with pytest.raises(ValueError, match=rf"exported {name} has no module for .*'three_norms' \(language.decoder.layers.0.{norm}"):
            family_of(model).check_export(replace(model, decoder=replace(model.decoder, variant="three_norms")))
    edit_model(copy, variant="three_norms")
    with pytest.raises(ValueError, match="has no module for 3 tensors"):
        convert_to_hf(copy, tmp_path / "out", verify=False)
    names = {f"language.decoder.layers.{layer}.{norm}": TensorInfo((128,), torch.float32) for layer in range(3)}
    stored, read = CheckpointReader.names, CheckpointReader.read
    monkeypatch.setattr(CheckpointReader, "names", lambda self: stored(self) | names)
    monkeypatch.setattr(
        CheckpointReader, "read", lambda self, name, row=None: torch.ones(128) if name in names else read(self, name, row=row)
    )
    with pytest.raises(ValueError, match="Llama cannot compute the decoder variant 'three_norms'"):
        convert_to_hf(copy, tmp_path / "alone", part="language", verify=False)
    monkeypatch.setitem(DECODER_VARIANTS, "three_norms", replace(complete, modeling=own_code(tmp_path)))
    convert_to_hf(copy, tmp_path / "alone", part="language", verify=False)
    assert torch.equal(read_all(tmp_path / "alone")[f"model.layers.2.{norm}"], torch.ones(128))
    monkeypatch.setitem(DECODER_VARIANTS, "three_norms", replace(forgets, modeling=own_code(tmp_path)))
    with pytest.raises(
        ValueError, match=rf"would lose 3 tensors of the decoder of debug_mm1 that are in no table: language.decoder.layers.0.{norm}, "
    ):
        convert_to_hf(copy, tmp_path / "lost", part="language", verify=False)
    assert not (tmp_path / "out").exists() and not (tmp_path / "lost").exists()
