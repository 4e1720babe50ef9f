"""Point-to-point messages between ranks that all know who sends what to whom."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist


def exchange(
    outgoing: Mapping[int, torch.Tensor],
    incoming: Mapping[int, int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    group: dist.ProcessGroup,
) -> dict[int, torch.Tensor]:
    """Send one message to each of some ranks and receive one from each of others, all at once.

    Args:
        outgoing: rank within ``group`` -> 1-D tensor of ``dtype``; a message to oneself is handed over as it is.
        incoming: rank within ``group`` -> number of elements of its message.
        dtype: of every message.
        device: where the backend wants its tensors.
        group: the ranks that take part; one with nothing to send or receive need not call.

    Returns:
        The messages by sender, on ``device``.
    """
    me = dist.get_rank(group)
    received = {source: torch.empty(numel, dtype=dtype, device=device) for source, numel in incoming.items()}
    operations, sent = [], []
    for peer in sorted(outgoing.keys() | incoming.keys()):
        if peer == me:
            received[me] = outgoing[me].to(device)
            continue
        if outgoing.get(peer) is not None and outgoing[peer].numel():
            sent.append(outgoing[peer].to(device).contiguous().view(torch.uint8))  # any dtype on any backend
            operations.append(dist.P2POp(dist.isend, sent[-1], group=group, group_peer=peer))
        if incoming.get(peer):
            operations.append(dist.P2POp(dist.irecv, received[peer].view(torch.uint8), group=group, group_peer=peer))
    for request in dist.batch_isend_irecv(operations) if operations else ():
        request.wait()
    return received
