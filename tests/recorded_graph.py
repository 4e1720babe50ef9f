"""CUDA graphs as they behave, on a CPU: what is captured is recorded and not carried out, and a replay runs the same
kernels on the same memory. What a capture forbids fails: asking for a value, and memory that the host fills."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_FORBIDDEN = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def _works(out: Any) -> list[dist.Work]:
    """What is to be waited for of a collective."""
    items = out if isinstance(out, list | tuple) else [out]
    boxed = [item for item in items if isinstance(item, torch.ScriptObject) and "Work" in item._type().name()]
    return [dist.Work.unbox(item) for item in boxed]


class CUDAGraph:
    """In the place of :class:`torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.replays = 0
        self._recorder: _Recorder | None = None

    def pool(self) -> tuple[int, int]:
        return (0, 1)

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        self._recorder = _Recorder(self)
        self._recorder.__enter__()

    def capture_end(self) -> None:
        recorder, self._recorder = self._recorder, None
        recorder.__exit__(None, None, None)
        if recorder.refused:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, outputs in self.calls:
            out = function(*args, **kwargs)
            for work in _works(out):
                work.wait()  # kernels of a graph are in order
            for made, kept in zip(_tensors(out), outputs, strict=True):
                if made.data_ptr() != kept.data_ptr():
                    kept.copy_(made)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: CUDAGraph) -> None:
        super().__init__()
        self.graph, self.before, self.refused = graph, {}, False

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        # A number that is assigned to a slice is filled in on the device; a list of numbers is copied there.
        from_host = function is aten.lift_fresh.default and args[0].dim() > 0
        if from_host or function in _FORBIDDEN:
            self.refused = True
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        if function._schema.is_mutable:
            for tensor in _tensors((args, kwargs)):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.before:
                    self.before[storage._cdata] = (storage, storage.clone())
        out = function(*args, **kwargs)
        if not function.is_view:
            self.graph.calls.append((function, args, kwargs, _tensors(out)))
        return out

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for storage, content in self.before.values():
            storage.copy_(content)


class _Stream:
    def __init__(self) -> None:
        pass

    def wait_stream(self, other: object) -> None:
        """On a CPU everything is in order."""


def pretend_graphs(monkeypatch: Any) -> list[CUDAGraph]:
    """Put these in the place of CUDA's; returns the graphs that are made."""
    graphs: list[CUDAGraph] = []

    class Noted(CUDAGraph):
        def __init__(self) -> None:
            super().__init__()
            graphs.append(self)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Noted)
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", _Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return graphs
