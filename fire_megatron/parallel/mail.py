"""Messages on CPU between a few ranks: sent without waiting, received when the receiver gets to them."""

from __future__ import annotations

import datetime
from collections import defaultdict, deque
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist

from fire_megatron.parallel.grid import IDLE

_DTYPES = (torch.int32, torch.float32, torch.int64, torch.uint8)


class Silence(Exception):
    """A rank did not send or receive in time."""

    def __init__(self, peer: int) -> None:
        """Args: peer: its global rank."""
        super().__init__(f"rank {peer} neither sends nor receives")
        self.peer = peer


class Mail:
    """1-D tensors from rank to rank, whatever the receiver is doing.

    Messages of one sender, receiver and tag arrive in the order in which they were sent. On GPUs they do not touch the
    devices: a send that waits for its receiver must not hold a stream up.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        pairs: Iterable[tuple[int, int]] = (),
        *,
        doing: Callable[[str], None] = lambda what: None,
    ) -> None:
        """Args: group: gloo, of the ranks that write to each other; None on other ranks, which may not use it; pairs:
        global ranks that will, the same on all ranks of the group: their first messages do not wait either; doing:
        is told whom this rank connects to."""
        self._group = group
        self._own: dict[int, deque[torch.Tensor]] = defaultdict(deque)
        self._sent: list[tuple[dist.Work, torch.Tensor, int]] = []
        self.bytes = 0
        """Bytes of all messages so far to and from other ranks."""
        if group is not None:
            self._connect(sorted({(min(pair), max(pair)) for pair in pairs}), doing)

    def _connect(self, pairs: Iterable[tuple[int, int]], doing: Callable[[str], None]) -> None:
        """Exchange a word within each pair, in an order that all know. gloo connects two ranks only when both have
        something for each other, and until then a send would wait."""
        me, word = dist.get_rank(), torch.zeros(1)
        for low, high in pairs:
            if low != high and me in (low, high):
                # For the message of the watch, which ends a run that hangs here: the wait itself has no end.
                doing(f"connecting to rank {low + high - me} over the network that GLOO_SOCKET_IFNAME names")
            if low != high and me == low:
                dist.isend(word, dst=high, group=self._group).wait(IDLE)
            elif low != high and me == high:
                dist.irecv(word, src=low, group=self._group).wait(IDLE)

    def send(self, values: torch.Tensor, *, to: int, tag: int) -> None:
        """Send a tensor on CPU to a global rank, which may be this one. Does not wait; the tensor must not change."""
        if to == dist.get_rank():
            self._own[tag].append(values)
            return
        header = torch.tensor([values.numel(), _DTYPES.index(values.dtype)])
        for part in (header, values) if values.numel() else (header,):
            self._sent.append((dist.isend(part, dst=to, group=self._group, tag=tag), part, to))
            self.bytes += part.nbytes

    def receive(self, *, source: int, tag: int, timeout: float | None = None) -> torch.Tensor:
        """The next message of a global rank.

        Args:
            source: who sends.
            tag: as sent.
            timeout: seconds; None waits as long as the sender lives.

        Raises:
            Silence: it did not come in time. The group is of no use afterwards.
        """
        if source == dist.get_rank():
            return self._own[tag].popleft()
        header = torch.zeros(2, dtype=torch.int64)
        self._wait(header, source, tag, timeout)
        numel, dtype = header.tolist()
        values = torch.empty(numel, dtype=_DTYPES[dtype])
        if numel:
            self._wait(values, source, tag, timeout)
        return values

    def _wait(self, buffer: torch.Tensor, source: int, tag: int, timeout: float | None) -> None:
        _finish(dist.irecv(buffer, src=source, group=self._group, tag=tag), source, timeout)
        self.bytes += buffer.nbytes

    def flush(self, timeout: float | None = None) -> None:
        """Wait until everything sent has been received.

        Raises:
            Silence: a receiver did not get to it in so many seconds.
        """
        for work, _, to in self._sent:
            _finish(work, to, timeout)
        self._sent.clear()


def _finish(work: dist.Work, peer: int, timeout: float | None) -> None:
    try:
        work.wait(datetime.timedelta(seconds=timeout) if timeout else IDLE)
    except RuntimeError as error:
        if "imed out" in str(error):
            raise Silence(peer) from error
        raise
