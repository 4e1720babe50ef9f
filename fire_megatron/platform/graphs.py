"""CUDA graphs of functions that work on memory that stays where it is; plain calls elsewhere."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch

from fire_megatron.config.errors import TrainingError

MOST = 64
"""Graphs that are kept, the last ones used: each holds some megabytes of the driver's memory."""


class Graphs:
    """Runs functions, on a GPU as graphs of all their kernels, which the host starts with one call.

    A function is run as it is the first time (whatever it makes once is made then), captured the second time, and
    replayed from then on. It must read and write the same memory each time, ask the device for nothing, and have no
    effect on the host that a replay would miss.
    """

    def __init__(self, enabled: bool) -> None:
        """Args: enabled: whether there is a GPU and graphs are wanted; otherwise functions are called."""
        self.enabled = enabled
        self.captured = 0
        """Graphs captured so far."""
        self._seen: set[Hashable] = set()
        self._graphs: OrderedDict[Hashable, Any] = OrderedDict()
        self._stream: Any = None
        self._pool: Any = None

    def run(self, key: Hashable, function: Callable[[], None]) -> None:
        """Run a function.

        Args:
            key: what the function depends on besides the memory that it works on.
            function: the same one for the same key.

        Raises:
            TrainingError: it cannot be captured.
        """
        if not self.enabled or key not in self._seen:
            self._seen.add(key)
            function()
            return
        if key not in self._graphs:
            if len(self._graphs) == MOST:
                self._graphs.popitem(last=False)
            self._graphs[key] = self._capture(function)
        self._graphs.move_to_end(key)
        self._graphs[key].replay()

    def forget(self) -> None:
        """Drop all graphs, since the memory that they work on is not what it was."""
        self._graphs.clear()
        self._seen.clear()
        self._pool = None

    def _capture(self, function: Callable[[], None]) -> Any:
        """A graph of the function. Not by ``torch.cuda.graph``, which empties the allocator's cache each time."""
        graph, self._stream = torch.cuda.CUDAGraph(), self._stream or torch.cuda.Stream()
        collecting = gc.isenabled()
        gc.disable()  # what is collected may free device memory, which a capture forbids
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                # Other threads (NCCL's watchdog) may query the device meanwhile.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    function()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            # Not to be gone on from: torch's allocator may take the capture for still under way.
            raise TrainingError(
                f"rollout.cuda_graphs: a decode step of this model cannot be captured ({error}); set "
                "rollout.cuda_graphs: false"
            ) from error
        finally:
            if collecting:
                gc.enable()
        torch.cuda.current_stream().wait_stream(self._stream)
        self._pool = self._pool or graph.pool()
        self.captured += 1
        return graph
