"""Host memory beside a GPU that is pretended: what is pinned, how often, and what crosses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fire_megatron.platform import host
from fire_megatron.platform.host import HostMemory, upload

CPU = torch.device("cpu")


class Gpu:
    """Stands for a CUDA device: the rest of torch takes the CPU."""

    type = "cuda"


@pytest.fixture
def pinned(monkeypatch):
    """Pretends that there is a GPU; returns the bytes of each pinned allocation, which tensors in it know of."""
    made, places, real = [], [], torch.empty

    def empty(*shape, device=None, pin_memory=False, **options):
        block = real(*shape, **options)
        if pin_memory:
            made.append(block.nbytes)
            places.append(range(block.data_ptr(), block.data_ptr() + block.nbytes))
        return block

    def is_pinned(tensor):
        return any(tensor.data_ptr() in place for place in places)

    monkeypatch.setattr(host, "compute_device", Gpu)
    monkeypatch.setattr(torch.Tensor, "is_pinned", is_pinned)
    monkeypatch.setattr(torch, "empty", empty)
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


def test_blocks_stop_doubling_and_one_tensor_may_need_a_larger_one(pinned, monkeypatch):
    monkeypatch.setattr(host, "_LEAST", 2**10)
    monkeypatch.setattr(host, "_MOST", 2**12)
    memory = HostMemory()
    for _ in range(16):
        memory.take((2**10,), torch.uint8)
    memory.take((2**14 - 1,), torch.uint8)
    assert pinned == [2**10, 2**10, 2**11, 2**12, 2**12, 2**12, 2**14]


@pytest.mark.parametrize("mib", [1, 65, 700, 1024, 1025, 2560])
def test_blocks_of_what_is_known_beforehand(pinned, mib):
    """Of a GiB and, at the end, the power of two that the rest fits in: what torch pins is what was asked for."""
    memory = HostMemory()
    memory.fit([mib * 2**20])
    whole, rest = divmod(mib, 1024)
    tail = [max(64, 2 ** (rest - 1).bit_length()) * 2**20] if rest else []
    assert pinned == [2**30] * whole + tail and memory.bytes == sum(pinned)
    memory.fit([2**20] * mib)
    assert len(pinned) == whole + len(tail), "what is there serves"
    memory.fit([])
    assert memory.bytes == 0


SIZES = st.lists(st.integers(0, 3 * 2**12), max_size=12)


@given(st.lists(st.tuples(SIZES, st.booleans(), st.booleans()), min_size=1, max_size=3))
def test_pieces_of_both_kinds_hold_what_is_written(rounds):
    """Whether blocks are fitted to a round or made on the way: pieces are whole, aligned and nobody else's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "_LEAST", 2**10)
        patch.setattr(host, "_MOST", 2**12)
        patch.setattr(host, "compute_device", Gpu)
        patch.setattr(host, "_allocate", lambda size, dtype: torch.empty(size, dtype=dtype))
        memory = HostMemory()
        for sizes, fits, whole in rounds:
            memory.fit(sizes) if fits else memory.reset()
            pieces = [[memory.take((size,), torch.uint8)] if whole else memory.spans(size) for size in sizes]
            values = [torch.randint(256, (size,), dtype=torch.uint8) for size in sizes]
            for value, parts in zip(values, pieces, strict=True):
                for here, there in zip(value.split([len(part) for part in parts]), parts, strict=True):
                    there.copy_(here)
            for size, value, parts in zip(sizes, values, pieces, strict=True):
                assert torch.equal(torch.cat(parts) if parts else value, value)
                assert all(part.storage_offset() % 512 == 0 for part in parts) and len(parts) <= size // 2**10 + 2
            assert all(len(block).bit_count() == 1 for block in memory._blocks)
            if fits and not whole:
                need = sum(-(-size // 512) * 512 for size in sizes)
                assert need <= memory.bytes < need + max(map(len, memory._blocks), default=1)


def test_what_is_fitted_is_kept_where_it_is():
    memory = HostMemory()
    memory.fit([host._MOST, 1])
    first, second = memory.spans(host._MOST), memory.spans(1)
    memory.fit([host._MOST])
    assert (
        memory.bytes == host._MOST
        and memory.spans(host._MOST)[0].data_ptr() == first[0].data_ptr() != second[0].data_ptr()
    )


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
