"""Pieces of distributed checkpoints are read in place, with any strides, and may contain only numbers."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mm.conversion.pieces import find_piece


def write(path: Path, tensor: object, *, before: int = 100) -> tuple[int, int]:
    """Write an archive into the middle of a file; return its offset and length."""
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    path.write_bytes(b"x" * before + buffer.getvalue() + b"y" * 50)
    return before, len(buffer.getvalue())


TENSORS = {
    "matrix": torch.randn(5, 7),
    "transposed": torch.randn(7, 5).T,
    "stack of transposed": torch.randn(3, 7, 5).transpose(1, 2),
    "rows are not outermost": torch.randn(4, 3, 5).transpose(0, 1),
    "bf16 vector": torch.randn(9).bfloat16(),
    "number": torch.tensor(3.5),
    "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    "empty": torch.zeros(0, 4),
}


@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS.keys())
def test_values_come_back(tensor: torch.Tensor, tmp_path: Path) -> None:
    offset, length = write(tmp_path / "file", tensor)
    piece = find_piece(tmp_path / "file", offset=offset, length=length, name="x")
    assert torch.equal(piece.read(), tensor)
    target = torch.empty(tensor.shape, dtype=tensor.dtype)
    piece.read_into(target)
    assert torch.equal(target, tensor)
    if tensor.ndim > 1 and tensor.numel():
        wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 2, dtype=tensor.dtype)
        piece.read_into(wide[..., 1:-1])  # a part of something larger
        assert torch.equal(wide[..., 1:-1], tensor) and not wide[..., 0].any() and not wide[..., -1].any()
        for row in range(tensor.shape[0]):
            target = torch.empty(tensor.shape[1:], dtype=tensor.dtype)
            piece.read_row_into(target, row=row)
            assert torch.equal(target, tensor[row])


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_what_is_no_tensor_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    offset, length = write(tmp_path / "file", Payload(tmp_path / "ran"))
    with pytest.raises(ValueError, match=r"a piece of x cannot be read .*it names"):
        find_piece(tmp_path / "file", offset=offset, length=length, name="x")
    assert not (tmp_path / "ran").exists()


def test_damaged_and_unusual_pieces_are_refused(tmp_path: Path) -> None:
    offset, length = write(tmp_path / "file", torch.ones(3))
    with pytest.raises(ValueError, match="a piece of x cannot be read"):
        find_piece(tmp_path / "file", offset=offset, length=length - 60, name="x")
    offset, length = write(tmp_path / "view", torch.ones(6)[2:4])
    with pytest.raises(ValueError, match="the piece of x is not stored in the format"):
        find_piece(tmp_path / "view", offset=offset, length=length, name="x")
    with zipfile.ZipFile(tmp_path / "packed", "w", zipfile.ZIP_DEFLATED) as packed:
        buffer = io.BytesIO()
        torch.save(torch.ones(100), buffer)
        with zipfile.ZipFile(buffer) as plain:
            for name in plain.namelist():
                packed.writestr(name, plain.read(name))
    size = (tmp_path / "packed").stat().st_size
    with pytest.raises(ValueError, match="the piece of x is not stored in the format"):
        find_piece(tmp_path / "packed", offset=0, length=size, name="x")
