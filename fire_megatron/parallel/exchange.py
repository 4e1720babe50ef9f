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
        outgoing: rank within ``group`` -> 1-D CPU tensor of ``dtype``; a message to oneself is handed over as it is.
        incoming: rank within ``group`` -> number of elements of its message.
        dtype: of every message.
        device: where the backend wants its tensors.
        group: the ranks that take part, all of which call, also with nothing to send or receive.

    Returns:
        The messages by sender, on CPU.
    """
    me = dist.get_rank(group)
    received = {rank: torch.empty(n, dtype=dtype, device=device) for rank, n in incoming.items() if rank != me and n}
    sent = {rank: values.to(device) for rank, values in outgoing.items() if rank != me and values.numel()}
    # As bytes, which every backend carries.
    operations = [
        dist.P2POp(send_or_receive, values.contiguous().view(torch.uint8), group=group, group_peer=rank)
        for send_or_receive, messages in ((dist.isend, sent), (dist.irecv, received))
        for rank, values in sorted(messages.items())
    ]
    for request in dist.batch_isend_irecv(operations) if operations else ():
        request.wait()
    whole = {rank: torch.empty(0, dtype=dtype) for rank in incoming} | {r: v.cpu() for r, v in received.items()}
    return whole | ({me: outgoing[me]} if me in incoming else {})
