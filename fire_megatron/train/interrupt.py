"""Ctrl-C, SIGTERM and SIGUSR1 (which schedulers send before a time limit): finish the phase, save, leave."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

from fire_megatron.platform.device import compute_device


class Stopped(Exception):
    """All ranks have agreed to leave; the step in progress is given up (it is redone exactly on resume)."""


class StopRequest:
    """Remembers that this process was asked to stop, and lets all ranks agree on it.

    The launcher signals each process on its own, at different moments; no rank may leave while another waits in a
    collective, so the ranks vote at fixed points of the step.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous: dict[int, object] = {}

    def install(self) -> StopRequest:
        """Catch SIGINT, SIGTERM and SIGUSR1. A second Ctrl-C interrupts at once. May be called again."""
        for number in () if self._previous else (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name

    def agreed(self, failed: bool = False, *, group: dist.ProcessGroup) -> bool:
        """Whether any rank has to stop. Collective: one all-reduce of two flags.

        Args:
            failed: whether this rank has to for another reason than a signal, which will be raised as an error.
            group: the ranks that agree.
        """
        flags = torch.tensor([float(self.signal_name is not None), float(failed)], device=compute_device())
        if group.size() > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
        signalled, failed_anywhere = flags.tolist()
        if signalled and self.signal_name is None:
            self.signal_name = "a signal to another rank"
        return bool(signalled or failed_anywhere)
