"""A small training checkpoint, written by the trainer's own code, and its export."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.trained import TEXTS, Trained, train_one_step
from transformers import dynamic_module_utils

from megatron_mm.config import MoEConfig
from megatron_mm.conversion.to_hf import Export, convert_to_hf
from megatron_mm.data.text.tokenizer import train_tokenizer


@pytest.fixture(scope="session", autouse=True)
def code_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let transformers copy exported code to a temporary folder instead of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(TEXTS, path, vocab_size=400)
    return path


@pytest.fixture(scope="session")
def trained(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A dense model and its checkpoint."""
    return train_one_step(tokenizer_path, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def sparse(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model with 4 experts in the second of its 3 layers, and its checkpoint."""
    return train_one_step(tokenizer_path, tmp_path_factory.mktemp("run"), moe=MoEConfig(num_experts=4, every_n_layers=2))


@pytest.fixture(scope="session")
def exported(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Export:
    return convert_to_hf(trained.checkpoint, tmp_path_factory.mktemp("export") / "model", dtype="float32", shard_size="500KB")
