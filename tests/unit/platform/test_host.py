"""Host memory beside a GPU that is pretended: what is pinned, how often, and what crosses."""

from __future__ import annotations

import pytest
import torch

from fire_megatron.platform import HostMemory, host, upload

CPU = torch.device("cpu")


class Gpu:
    """Stands for a CUDA device: the rest of torch takes the CPU."""

    type = "cuda"


@pytest.fixture
def pinned(monkeypatch):
    """Pretends that there is a GPU; returns the bytes of each pinned allocation, which tensors in it know of."""
    made, places = [], []

    def pin(size, dtype):
        block = torch.empty(size, dtype=dtype)
        made.append(block.nbytes)
        places.append(range(block.data_ptr(), block.data_ptr() + block.nbytes))
        return block

    def is_pinned(tensor):
        return any(tensor.data_ptr() in place for place in places)

    monkeypatch.setattr(host, "_pinned", pin)
    monkeypatch.setattr(host, "compute_device", Gpu)
    monkeypatch.setattr(torch.Tensor, "is_pinned", is_pinned)
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, device=None, **k: real(*a, **k))
    return made


def test_pieces_do_not_overlap_and_are_lent_again(pinned):
    memory = HostMemory()
    for step in range(3):
        memory.reset()
        pieces = [
            memory.copy(torch.full((n, 3), float(n + step), dtype=dtype), wait=False)
            for n in range(20)
            for dtype in (torch.bfloat16, torch.float32, torch.int32)
        ]
        for number, piece in enumerate(pieces):
            assert piece.shape == (number // 3, 3) and bool((piece == number // 3 + step).all())
    assert pinned == [host._LEAST], "allocated once, for all steps"


def test_blocks_are_few_and_sizes_powers_of_two(pinned):
    memory, size = HostMemory(), host._LEAST // 4 + 1
    for _ in range(2):
        memory.reset()
        taken = [memory.take((size,), torch.uint8) for _ in range(30)]
        memory.take((5 * host._LEAST + 1,), torch.uint8)
    assert pinned == [n * host._LEAST for n in (1, 1, 2, 4, 8)]
    assert len({piece.data_ptr() for piece in taken}) == 30


def test_without_a_gpu_nothing_is_held():
    memory = HostMemory()
    first = memory.copy(torch.arange(4), wait=True)
    memory.reset()
    memory.take((4,), torch.int64).zero_()
    assert first.tolist() == [0, 1, 2, 3] and not memory._blocks


def test_pinned_tensors_cross_as_they_are_others_by_way_of_one_buffer(pinned):
    memory = HostMemory()
    kept = [memory.copy(torch.arange(6.0).view(3, 2) + i, wait=True) for i in range(2)]
    expected = torch.cat(kept).flatten()
    pinned.clear()
    assert torch.equal(upload(kept, dtype=torch.float32, device=Gpu()), expected) and pinned == []
    assert torch.equal(upload([kept[0], kept[1].clone()], dtype=torch.float32, device=Gpu()), expected)
    assert pinned == [expected.nbytes]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16])
def test_upload_on_a_cpu(dtype):
    parts = [torch.arange(6, dtype=dtype).view(2, 3), torch.zeros(0, dtype=dtype), torch.ones(2, dtype=dtype)]
    laid = upload(parts, dtype=dtype, device=CPU)
    assert laid.dtype == dtype and laid.tolist() == [0, 1, 2, 3, 4, 5, 1, 1]
    assert upload([], dtype=dtype, device=CPU).shape == (0,)
