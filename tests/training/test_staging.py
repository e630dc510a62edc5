"""What a save copies to its host is what the writer reads, whatever training does meanwhile."""

from __future__ import annotations

import io
import mmap
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from megatron_mm.training.checkpoint.staging import Staging

CPU = torch.device("cpu")  # stands in for a GPU: everything but pinning is the same


def buckets(tensors: list[torch.Tensor]) -> list[Any]:
    half = len(tensors) // 2
    return [("folder/a", "a", (["object"], list(enumerate(tensors[:half])))), ("folder/b", "b", ([], list(enumerate(tensors[half:]))))]


def tensors_of(staged: list[Any]) -> list[torch.Tensor]:
    return [tensor for _, _, (_, pairs) in staged for _, tensor in pairs]


def some() -> list[torch.Tensor]:
    wide = torch.arange(24.0).view(4, 6)
    return [wide, wide[:, 1:3], torch.ones(3, dtype=torch.bfloat16), torch.tensor(7, dtype=torch.int64), torch.empty(0), torch.rand(70_000)]


def test_staged_tensors_are_copies_of_equal_type_and_shape() -> None:
    originals = some()
    expected = [tensor.clone() for tensor in originals]
    staged = Staging(CPU).stage(buckets(originals))
    for tensor in originals:
        tensor.zero_()
    assert [(path, name, objects) for path, name, (objects, _) in staged] == [("folder/a", "a", ["object"]), ("folder/b", "b", [])]
    for found, wanted in zip(tensors_of(staged), expected, strict=True):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)


def test_a_staged_tensor_is_written_alone() -> None:
    staged = tensors_of(Staging(CPU).stage(buckets(some())))
    file = io.BytesIO()
    torch.save(staged[0], file)
    assert file.tell() < 4000
    assert all(tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() for tensor in staged)


def test_the_memory_is_kept_until_a_save_needs_more() -> None:
    staging = Staging(CPU)
    first = [tensor.data_ptr() for tensor in tensors_of(staging.stage(buckets([torch.rand(100_000), torch.rand(50)])))]
    again = [tensor.data_ptr() for tensor in tensors_of(staging.stage(buckets([torch.rand(100_000), torch.rand(50)])))]
    assert again == first
    larger = tensors_of(staging.stage(buckets([torch.full((300_000,), 2.0), torch.rand(50)])))
    assert float(larger[0].sum()) == 600_000


def test_a_forked_writer_reads_what_was_staged() -> None:
    source = torch.full((200_000,), 3.0)
    (staged,) = tensors_of(Staging(CPU).stage(buckets([source])))
    read, write = os.pipe()
    if os.fork() == 0:
        os.read(read, 1)
        os._exit(0 if (staged.numpy() == 3.0).all() else 1)  # torch would use threads, which a fork does not have
    child = -1
    source.fill_(4.0)  # training goes on
    os.write(write, b"x")
    _, child = os.wait()
    os.close(read), os.close(write)
    assert os.waitstatus_to_exitcode(child) == 0


def test_a_host_without_room_stages_as_megatron_core_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*unused: Any) -> Any:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", no_room)
    request = AsyncRequest(print, (0, buckets([torch.ones(5)]), None), [], preload_fn=lambda: "staged anew")
    changed = Staging(CPU).of(request)
    assert changed.preload_fn is not None and changed.preload_fn() == "staged anew"


@pytest.mark.parametrize("writes", [True, False])
def test_a_request_stages_what_it_writes(writes: bool) -> None:
    files = buckets([torch.ones(5)])
    request = AsyncRequest(print, (0, files, None), [], preload_fn=(lambda: files) if writes else None)
    changed = Staging(CPU).of(request)
    assert changed.async_fn is print and (changed.preload_fn is None) == (not writes)
    if changed.preload_fn is not None:
        assert torch.equal(tensors_of(changed.preload_fn())[0], torch.ones(5))


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Addresses that are pinned on a pretended GPU; it is an error to unpin others."""
    addresses: list[int] = []

    def register(address: int, size: int, flags: int) -> int:
        addresses.append(address)
        return 0

    cudart = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=addresses.remove)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return addresses


def test_memory_is_unpinned_before_it_is_given_back(pinned: list[int]) -> None:
    """Also if nobody asks for it, as when a run goes back to an earlier checkpoint: other memory may get the same addresses."""
    staging = Staging(torch.device("cuda"))
    staging.stage([])
    assert len(pinned) == 1
    staging.release()
    assert not pinned
    staging.stage([])
    if os.fork() == 0:
        del staging  # a writer has no GPU
        os._exit(len(pinned))
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 1
    del staging
    assert not pinned


def test_memory_that_cannot_be_pinned_is_not_unpinned(pinned: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA would report the mistake at the next operation, which belongs to training."""
    monkeypatch.setattr(torch.cuda.cudart(), "cudaHostRegister", lambda *_: 801)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: None)
    staging = Staging(torch.device("cuda"))
    staging.stage([])
    staging.release()
