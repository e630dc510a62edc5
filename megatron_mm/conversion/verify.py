"""Checks whether two checkpoints hold the same model: names, shapes, values and, on a prompt, logits.

Each may be a Hugging Face directory or one of our checkpoints, which is first exported to a temporary directory. Tensors are compared one
at a time; transformers computes the logits on a CPU in float32.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_mm.conversion.hf_reader import WEIGHT_FILES, HfReader
from megatron_mm.conversion.to_hf import convert_to_hf

LOGITS_TOLERANCE = 1e-4
"""Allowed difference of logits, relative to the largest logit. Two implementations with the same weights in float32 differed by 1e-6.
Different settings in config.json, such as the base of rotary positions, lead to larger differences."""
ROUNDED_TOLERANCE = 0.1
"""The tolerance if one checkpoint has rounded weights, for example bfloat16 with its 3 digits."""


@dataclass(frozen=True)
class Different:
    """A tensor whose values differ."""

    name: str
    norms: tuple[float, float]
    largest: float
    """Largest absolute difference of a value."""


@dataclass(frozen=True)
class Verification:
    """Result of a comparison."""

    num_equal: int
    """Number of bit-identical tensors."""
    num_rounded: int = 0
    """Number of tensors whose types differ and that are equal once the wider one is rounded to the narrower type."""
    only_in_first: list[str] = field(default_factory=list)
    only_in_second: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    """Name and both shapes of each tensor whose shapes differ."""
    different: list[Different] = field(default_factory=list)
    logits: float | None = None
    """Largest absolute difference of the logits; None if no prompt was given."""
    scale: float | None = None
    """Largest absolute logit."""
    not_loaded: list[str] = field(default_factory=list)
    """Tensors that transformers reports as missing or unexpected if a prompt was given. If there are any, logits are not compared."""

    @property
    def passed(self) -> bool:
        """Whether the tensors are the same and, if a prompt was given, transformers loaded all of them and computes the same logits."""
        return self.same_tensors and not self.not_loaded and self.same_logits

    @property
    def same_logits(self) -> bool:
        """Whether logits agree within `LOGITS_TOLERANCE`, or `ROUNDED_TOLERANCE` for rounded weights; true if no prompt was given."""
        if self.logits is None or self.scale is None:
            return True
        return self.logits <= self.scale * (ROUNDED_TOLERANCE if self.num_rounded else LOGITS_TOLERANCE)

    @property
    def same_tensors(self) -> bool:
        return not (self.only_in_first or self.only_in_second or self.shapes or self.different)


def verify(first: Path, second: Path, *, prompt: str | None = None, threads: int = 4) -> Verification:
    """Compare two checkpoints.

    Args:
        first, second: Hugging Face directories, run directories or checkpoints of ours.
        prompt: text for which logits are computed. This runs the code in a model's directory: use it only for models that you trust.

    Raises ValueError if one of them cannot be read.
    """
    with _as_hf(first, threads=threads) as a, _as_hf(second, threads=threads) as b:
        found = _compare(HfReader(a), HfReader(b))
        if prompt is None:
            return found
        for path, folder in ((first, a), (second, b)):
            _check_code(path, folder)
        ids, logits = _ids(a, prompt), []
        for which, folder in (("the first", a), ("the second", b)):
            model, not_loaded = _load(folder)
            found.not_loaded.extend(f"{which}: {line}" for line in not_loaded)
            logits.append(_logits(model, ids))
        if found.not_loaded:
            return found
        if logits[0].shape != logits[1].shape:
            raise ValueError(f"logits have the shapes {list(logits[0].shape)} and {list(logits[1].shape)}: the vocabularies differ")
        difference, scale = float((logits[0] - logits[1]).abs().max()), float(logits[0].abs().max())
        return Verification(**{**vars(found), "logits": difference, "scale": scale})


def report(found: Verification) -> Iterator[str]:
    """Lines for the terminal."""
    yield f"{found.num_equal} tensors are bit-identical"
    if found.num_rounded:
        yield f"{found.num_rounded} tensors differ in type and are equal after rounding to the narrower type"
    for title, names in (("only in the first", found.only_in_first), ("only in the second", found.only_in_second)):
        if names:
            yield f"{len(names)} {title}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
    for line in found.shapes:
        yield f"other shape: {line}"
    for tensor in found.different:
        norms = f"norms {tensor.norms[0]:.6g} and {tensor.norms[1]:.6g}"
        yield f"different values: {tensor.name}: {norms}, largest difference {tensor.largest:.3g}"
    for line in found.not_loaded:
        yield f"transformers does not load {line}"
    if found.logits is not None:
        verdict = "" if found.same_logits else ": too much for the same model; compare the two config.json files"
        yield f"logits differ by at most {found.logits:.3g}, of values up to {found.scale:.3g}{verdict}"


@contextmanager
def _as_hf(path: Path, *, threads: int) -> Iterator[Path]:
    if path.is_file() or any((path / name).is_file() for name in WEIGHT_FILES):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        convert_to_hf(path, Path(folder) / "export", threads=threads)
        yield Path(folder) / "export"


def _compare(first: HfReader, second: HfReader) -> Verification:
    a, b = first.names(), second.names()
    shapes, different, equal, rounded = [], [], 0, 0
    for name in a:
        if name not in b:
            continue
        if a[name].shape != b[name].shape:
            shapes.append(f"{name}: {list(a[name].shape)} and {list(b[name].shape)}")
            continue
        left, right = first.read(name), second.read(name)
        if left.dtype == right.dtype and torch.equal(left, right):
            equal += 1
            continue
        if _equal_once_rounded(left, right):
            rounded += 1
            continue
        x, y = left.double(), right.double()
        largest = float((x - y).abs().max()) if x.numel() else 0.0
        different.append(Different(name, (float(x.norm()), float(y.norm())), largest))
    only_in_first, only_in_second = ([name for name in one if name not in other] for one, other in ((a, b), (b, a)))
    return Verification(equal, rounded, only_in_first, only_in_second, shapes, different)


def _equal_once_rounded(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Return whether two tensors of different floating-point types are equal in the narrower type."""
    if left.dtype == right.dtype or not (left.is_floating_point() and right.is_floating_point()):
        return False
    narrow, wide = sorted((left, right), key=lambda tensor: tensor.element_size())
    return torch.equal(wide.to(narrow.dtype), narrow)


def _check_code(path: Path, folder: Path) -> None:
    """Raise ValueError if config.json names modeling code that is not in the folder, as for models whose code only their authors
    publish."""
    config = folder / "config.json"
    named = json.loads(config.read_text()).get("auto_map", {}).values() if config.is_file() else ()
    files = sorted({f"{name.rpartition('--')[2].partition('.')[0]}.py" for name in named if isinstance(name, str)})
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ValueError(
            f"{path}: its Hugging Face model needs {', '.join(missing)}, which exports do not include (its "
            "README.md names their source): "
            "compare two exports that contain these files, or leave out --prompt"
        )


def _ids(folder: Path, prompt: str) -> torch.Tensor:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(prompt, return_tensors="pt")["input_ids"]


def _load(folder: Path) -> tuple[torch.nn.Module, list[str]]:
    """Load a model; also return its missing tensors, which transformers draws at random, and its unexpected ones, which it drops."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    kinds = (("missing", "missing_keys"), ("unexpected", "unexpected_keys"))
    return model.float().eval(), [f"{name} ({kind})" for kind, keys in kinds for name in sorted(info[keys])]


def _logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits
