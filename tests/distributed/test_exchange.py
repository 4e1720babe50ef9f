"""Messages between ranks that know who sends what to whom."""

import pytest
import torch
import torch.distributed as dist

from fire_megatron.parallel.exchange import exchange
from fire_megatron.teachers.states import slice_width, split_columns


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int32])
def test_every_pair_and_oneself(rank, world_size, dtype):
    # To each rank, as many elements as its number, one more a round: the first rank gets an empty message at first.
    for extra in range(3):
        outgoing = {to: torch.full((to + extra,), rank * 10 + to, dtype=dtype) for to in range(world_size)}
        incoming = dict.fromkeys(range(world_size), rank + extra)
        received = exchange(outgoing, incoming, dtype=dtype, device=torch.device("cpu"), group=dist.group.WORLD)
        assert received.keys() == incoming.keys()
        for source, values in received.items():
            assert torch.equal(values, torch.full((rank + extra,), source * 10 + rank, dtype=dtype))


def test_only_some_send(rank, world_size):
    last = world_size - 1
    outgoing = {0: torch.arange(5)} if rank == last else {}
    incoming = {last: 5} if rank == 0 else {}
    received = exchange(outgoing, incoming, dtype=torch.int64, device=torch.device("cpu"), group=dist.group.WORLD)
    assert received.keys() == incoming.keys()
    assert rank or torch.equal(received[last], torch.arange(5))


@pytest.mark.parametrize(("width", "parts"), [(8, 4), (7, 4), (3, 4), (5, 1)])
def test_columns_are_split_and_put_together(width, parts):
    states = torch.arange(3 * width).view(3, width)
    pieces = split_columns(states, parts)
    assert [piece.shape for piece in pieces] == [(3, slice_width(width, parts))] * parts
    assert torch.equal(torch.cat(pieces, -1)[:, :width], states)
