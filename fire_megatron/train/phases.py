"""What a step is doing: for the watch over stalled ranks, for the console, and as ``time/<phase>``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fire_megatron.metrics.values import Max, Value
from fire_megatron.platform.device import Device, synchronize
from fire_megatron.platform.watch import Watch
from fire_megatron.rollout.engine import Progress


class Phases:
    """The phases of the step in progress, on one rank."""

    def __init__(self, watch: Watch, device: Device) -> None:
        """Args: watch: is told of each phase; device: is waited for at its end, so that its work counts."""
        self.watch, self._device = watch, device
        self.show: Callable[[str], None] = lambda text: None
        """Shows a text about the step in progress to people; called often."""
        self._seconds: dict[str, float] = {}

    def restart(self) -> None:
        """Forget the times of the step before."""
        self._seconds = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """A phase, timed; one that comes several times adds up."""
        self.watch.doing(name)
        started = time.perf_counter()
        yield
        synchronize(self._device)
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def progress(self, name: str, most: int) -> Progress:
        """Shows how far a phase is; ``most`` tokens is all that it can sample."""
        done = 0

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            self.show(f"{name} {done / max(most, 1):.0%}")

        return advance

    def metrics(self) -> dict[str, Value]:
        """``time/<phase>`` of each, in seconds, of the slowest rank."""
        return {f"time/{name}": Max(seconds) for name, seconds in self._seconds.items()}
