"""Point-to-point messages between ranks that all know who sends what to whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from fire_megatron.platform.device import compute_device
from fire_megatron.platform.host import HostMemory, upload


def exchange(
    outgoing: Mapping[int, Sequence[torch.Tensor]],
    incoming: Mapping[int, int],
    *,
    dtype: torch.dtype,
    group: dist.ProcessGroup,
    memory: HostMemory,
) -> dict[int, torch.Tensor]:
    """Send one message to each of some ranks and receive one from each of others, all at once.

    With NCCL the group must have communicated before: its first collective takes all of its ranks, and here those
    without messages take no part.

    Args:
        outgoing: rank within ``group``, not one's own -> tensors on the host, of ``dtype`` and any shapes, which are
            laid end to end; from pinned memory they cross to the device as they are.
        incoming: rank within ``group``, not one's own -> number of elements of its message.
        dtype: of every message.
        group: the ranks that take part, all of which call, also with nothing to send or receive.
        memory: lends the memory for what is received.

    Returns:
        The messages by sender, on the host.
    """
    device, me = compute_device(), dist.get_rank(group)
    assert me not in outgoing and me not in incoming, "what stays here is not sent"
    received = {rank: torch.empty(n, dtype=dtype, device=device) for rank, n in incoming.items()}
    sent = {rank: upload(parts, dtype=dtype, device=device) for rank, parts in outgoing.items()}
    # As bytes, which every backend carries; in one batch, which takes the group's communicator and not one a pair.
    operations = [
        dist.P2POp(send_or_receive, values.view(torch.uint8), group=group, group_peer=rank)
        for send_or_receive, messages in ((dist.isend, sent), (dist.irecv, received))
        for rank, values in sorted(messages.items())
        if len(values)
    ]
    for request in dist.batch_isend_irecv(operations) if operations else ():
        request.wait()
    return {rank: memory.copy(values, wait=True) for rank, values in received.items()}
