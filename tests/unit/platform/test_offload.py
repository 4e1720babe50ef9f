"""Tensors that wait on the host come back as they were, in every view."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fire_megatron.platform import host
from fire_megatron.platform.offload import Offload

BLOCK = 4096


def test_memory_is_given_up_and_every_view_comes_back():
    buffer = torch.randn(12, 4)
    parameter = torch.nn.Parameter(buffer[3:7])
    other = torch.arange(5, dtype=torch.int64)
    before = buffer.clone()
    offload = Offload(lambda: [parameter, buffer, other], constant=False)
    offload.leave()
    assert offload.away and buffer.untyped_storage().nbytes() == other.untyped_storage().nbytes() == 0
    offload.leave()  # once is enough
    offload.come_back()
    assert not offload.away
    assert torch.equal(buffer, before) and torch.equal(parameter, before[3:7]) and other.tolist() == list(range(5))
    assert parameter.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


def test_what_changes_between_is_kept():
    weight = torch.nn.Parameter(torch.ones(3))
    offload = Offload(lambda: [weight], constant=False)
    for step in range(3):
        offload.leave()
        offload.come_back()
        assert weight.tolist() == [1.0 + step] * 3
        with torch.no_grad():
            weight += 1


def test_what_is_constant_is_copied_once():
    weight = torch.ones(3)
    offload = Offload(lambda: [weight], constant=True)
    offload.leave()
    offload.come_back()
    weight += 1  # a promise broken, to see that the first copy is the one that comes back
    offload.leave()
    offload.come_back()
    assert weight.tolist() == [1.0] * 3


def test_tensors_that_came_later_leave_too_and_those_that_went_are_forgotten():
    held = [torch.ones(2)]
    offload = Offload(lambda: held, constant=False)
    offload.leave()
    offload.come_back()
    held[:] = [torch.full((3,), 7.0)]
    offload.leave()
    assert held[0].untyped_storage().nbytes() == 0 and len(offload._places) == 1
    offload.come_back()
    assert held[0].tolist() == [7.0] * 3


def test_a_constant_tensor_that_came_later_is_copied_too():
    held = [torch.ones(2)]
    offload = Offload(lambda: held, constant=True)
    for value in range(3):
        offload.leave()
        offload.come_back()
        assert [tensor.tolist() for tensor in held] == [[1.0, 1.0], *([float(i)] for i in range(value))]
        held.append(torch.tensor([float(value)]))


@given(st.lists(st.lists(st.integers(1, 3 * BLOCK), max_size=6), min_size=1, max_size=3), st.booleans())
def test_blocks_hold_whatever_comes(rounds, constant):
    """Tensors of each round beside those of before, bit by bit; little more memory than they need, and no address of a
    tensor's place that is not aligned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "_LEAST", 512)
        patch.setattr(host, "_MOST", BLOCK)
        held, kept = [], []
        away = Offload(lambda: held, constant=constant)
        for number, sizes in enumerate(rounds):
            held += [torch.randint(256, (size,), dtype=torch.uint8) for size in sizes]
            if number == 2:
                del held[:4], kept[:4]
            kept = [*kept, *(tensor.clone() for tensor in held[len(kept) :])]
            away.leave()
            need = sum(-(-len(tensor) // 512) * 512 for tensor in kept)
            assert need <= away._host.bytes < need + BLOCK
            for place in away._places.values():
                assert sum(map(len, place.parts)) == place.size and len(place.parts) <= place.size // 512 + 2
                assert all(part.storage_offset() % 512 == 0 for part in place.parts)
            assert all(tensor.untyped_storage().nbytes() == 0 for tensor in held)
            away.come_back()
            assert all(torch.equal(a, b) for a, b in zip(held, kept, strict=True))
