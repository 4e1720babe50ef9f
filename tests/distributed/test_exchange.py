"""Messages between ranks that know who sends what to whom."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fire_megatron.parallel.collectives import wait_for_all
from fire_megatron.parallel.exchange import exchange
from fire_megatron.parallel.grid import GridFactory
from fire_megatron.parallel.mail import Mail
from fire_megatron.platform import launch
from fire_megatron.platform.host import HostMemory
from fire_megatron.teachers.messages import slice_width, split_columns


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


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts what Linux tells of")
def test_a_group_takes_connections_when_it_is_used(world_size):
    """At 512 ranks, some groups of all of them would otherwise exhaust the descriptors: n - 1 connections each."""

    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    factory = GridFactory(timeout=60.0)
    wait_for_all(group=dist.group.WORLD)
    before, count = descriptors(), 8
    groups = [factory.cpu_group(range(world_size), purpose=f"test {number}") for number in range(count)]
    made = descriptors() - before
    # Its listening socket, and what wakes its thread, are 4 in a world of any size.
    assert made < (4 + (world_size - 1) / 2) * count, "no connections, but for a late one of an earlier test"
    for group in groups[:4]:
        wait_for_all(group=group)
    used = descriptors() - before - made
    # Those of an earlier test may still be closing meanwhile.
    assert 0 < used < 4 * 2 * (world_size - 1).bit_length() + 4, "a barrier takes two a round"


def test_a_first_letter_waits_for_nobody(rank, world_size):
    """The receiver looks at what it has got only when it knows that the sender has gone on."""
    group = GridFactory(timeout=60.0).cpu_group(range(world_size), purpose="letters")
    said = []
    mail, store = Mail(group, [(0, 1), (1, 0), (0, 0)], doing=said.append), launch.store()
    expected = [f"connecting to rank {1 - rank} over the network that GLOO_SOCKET_IFNAME names"]
    assert said == (expected if rank < 2 else [])
    for sender in (0, 1):
        if rank == sender:
            mail.send(torch.arange(3) + sender, to=1 - sender, tag=5)
            store.set(f"letter {sender} sent", "")
        elif rank == 1 - sender:
            store.wait([f"letter {sender} sent"])
            assert mail.receive(source=sender, tag=5, timeout=30.0).tolist() == [sender, sender + 1, sender + 2]
    mail.flush(30.0)


@pytest.mark.parametrize(("width", "parts"), [(8, 4), (7, 4), (3, 4), (5, 1)])
def test_columns_are_split_and_put_together(width, parts):
    states = torch.arange(3 * width).view(3, width)
    pieces = split_columns(states, parts)
    assert [piece.shape for piece in pieces] == [(3, slice_width(width, parts))] * parts
    assert torch.equal(torch.cat(pieces, -1)[:, :width], states)
