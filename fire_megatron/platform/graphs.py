"""CUDA graphs of functions that work on memory that stays where it is; plain calls elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable
from typing import Any

import torch


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
        self._graphs: dict[Hashable, Any] = {}
        self._pool: Any = None

    def run(self, key: Hashable, function: Callable[[], None]) -> None:
        """Run a function.

        Args:
            key: what the function depends on besides the memory that it works on.
            function: the same one for the same key.
        """
        if not self.enabled or key not in self._seen:
            self._seen.add(key)
            function()
            return
        graph = self._graphs.get(key) or self._capture(key, function)
        if graph is None:
            function()
        else:
            graph.replay()

    def forget(self) -> None:
        """Drop all graphs, since the memory that they work on is not what it was."""
        self._graphs.clear()
        self._seen.clear()
        self._pool = None

    def _capture(self, key: Hashable, function: Callable[[], None]) -> Any:
        """A graph of the function; None where it cannot be captured, which turns graphs off for good."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads (NCCL's watchdog) may query the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                function()
        except RuntimeError as error:
            print(f"note: decoding goes on without CUDA graphs: {error}", file=sys.stderr, flush=True)
            self.forget()
            self.enabled = False
            return None
        self._pool = self._pool or graph.pool()
        self._graphs[key] = graph
        self.captured += 1
        return graph


def storage_address(tensor: torch.Tensor) -> int:
    """Where a tensor's memory is; of one without memory of its own, such as an FP8 weight in parts, which one it is."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return id(tensor)
