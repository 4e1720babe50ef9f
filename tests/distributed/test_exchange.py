"""Messages between ranks that know who sends what to whom."""

import pytest
import torch
import torch.distributed as dist

from fire_megatron.parallel.exchange import exchange
from fire_megatron.platform import HostMemory
from fire_megatron.teachers.states import slice_width, split_columns


def sent(outgoing, incoming, dtype):
    return exchange(outgoing, incoming, dtype=dtype, group=dist.group.WORLD, memory=HostMemory())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int32])
def test_every_pair(rank, world_size, dtype):
    # To each rank, twice as many elements as its number, one more a round: the first rank gets nothing at first.
    others = [other for other in range(world_size) if other != rank]
    for extra in range(3):
        outgoing = {to: [torch.full((to, 2), rank * 10 + to), torch.full((extra,), 5)] for to in others}
        outgoing = {to: [part.to(dtype) for part in parts] for to, parts in outgoing.items()}
        received = sent(outgoing, dict.fromkeys(others, 2 * rank + extra), dtype)
        assert list(received) == others
        for source, values in received.items():
            assert values.tolist() == [source * 10 + rank] * 2 * rank + [5] * extra and values.dtype == dtype


def test_only_some_send(rank, world_size):
    last = world_size - 1
    outgoing = {0: [torch.arange(5)]} if rank == last else {}
    incoming = {last: 5} if rank == 0 else {}
    received = sent(outgoing, incoming, torch.int64)
    assert received.keys() == incoming.keys()
    assert rank or torch.equal(received[last], torch.arange(5))


@pytest.mark.parametrize(("width", "parts"), [(8, 4), (7, 4), (3, 4), (5, 1)])
def test_columns_are_split_and_put_together(width, parts):
    states = torch.arange(3 * width).view(3, width)
    pieces = split_columns(states, parts)
    assert [piece.shape for piece in pieces] == [(3, slice_width(width, parts))] * parts
    assert torch.equal(torch.cat(pieces, -1)[:, :width], states)
