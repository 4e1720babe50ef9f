"""Tensors that wait on the host come back as they were, in every view."""

import torch

from fire_megatron.platform import Offload


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
    assert held[0].untyped_storage().nbytes() == 0 and len(offload._copies) == 1
    offload.come_back()
    assert held[0].tolist() == [7.0] * 3
