"""CUDA graphs as they behave, on a CPU: what is captured is recorded and not carried out, and a replay runs the same
kernels on the same memory. What a capture forbids fails: asking for a value, and memory that the host fills."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_FORBIDDEN = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in _tensors(item)]


class CUDAGraph:
    """In the place of :class:`torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.replays = 0

    def pool(self) -> tuple[int, int]:
        return (0, 1)

    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, outputs in self.calls:
            for made, kept in zip(_tensors(function(*args, **kwargs)), outputs, strict=True):
                if made.data_ptr() != kept.data_ptr():
                    kept.copy_(made)


class capture(TorchDispatchMode):
    """In the place of :class:`torch.cuda.graph`."""

    def __init__(self, graph: CUDAGraph, pool: Any = None, capture_error_mode: str = "global") -> None:
        super().__init__()
        self.graph, self.before = graph, {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        # A number that is assigned to a slice is filled in on the device; a list of numbers is copied there.
        from_host = function is aten.lift_fresh.default and args[0].dim() > 0
        if from_host or function in _FORBIDDEN:
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
