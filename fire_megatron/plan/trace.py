"""A record of what torch does: bytes alive, bytes of every collective, floating-point operations.

It works on real tensors, to measure a run, and on meta tensors, to foresee one; what it counts is the same. On meta
tensors it also answers questions about values, which have none: those that a program made from Python numbers are kept
beside them as long as they are small (peers in a simulated world have the same ones), everything else reads as zero.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

_SMALL = 4096
"""Elements of a tensor whose values are worth keeping beside a meta tensor."""
_COLLECTIVES = {
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "allgather_coalesced_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "reduce_scatter_": "reduce-scatter",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "alltoall_": "all-to-all",
    "alltoall_base_": "all-to-all",
    "broadcast_": "broadcast",
    "gather_": "gather",
    "scatter_": "scatter",
    "send": "send",
    "recv_": "receive",
}
"""torch's operators and what they are called here."""


_CPU = torch.device("cpu")
_aten = torch.ops.aten


@dataclass(frozen=True)
class Collective:
    """A kind of collective on a group."""

    operation: str
    """``all-reduce``, ``all-gather``, ``reduce-scatter``, ``all-to-all``, ``broadcast``, ``send``, ``receive``, ..."""
    ranks: tuple[int, ...]
    """Global ranks of the group."""


@dataclass
class Trace:
    """What was seen."""

    bytes: Counter[Collective] = field(default_factory=Counter)
    """Message bytes of this rank: of the larger side of a collective, input or output, as NCCL's tests count them."""
    calls: Counter[Collective] = field(default_factory=Counter)
    """Number of collectives."""
    flops: int = 0
    """Floating-point operations of matrix products and attention."""
    operators: int = 0
    """Operators that compute, each a kernel or so."""
    live: int = 0
    """Bytes of tensors made since the beginning that are still held."""
    peak: int = 0
    """Most of them at a time."""

    def messages(self) -> Iterator[tuple[Collective, int, int]]:
        """Collective, bytes and calls, of those that send something to another rank."""
        for collective, calls in self.calls.items():
            if self.bytes[collective] and len(collective.ranks) > 1:
                yield collective, self.bytes[collective], calls

    @classmethod
    def total(cls, *terms: tuple[int, Trace]) -> Trace:
        """So many times each of them, one after the other."""
        result = cls()
        for times, trace in terms:
            for key in trace.calls:
                result.bytes[key] += times * trace.bytes[key]
                result.calls[key] += times * trace.calls[key]
            result.flops += times * trace.flops
            result.operators += times * trace.operators
        result.peak = max((trace.peak for _, trace in terms), default=0)
        result.live = max((trace.live for _, trace in terms), default=0)
        return result


def _attention_flops(query: Any, key: Any, value: Any, *rest: Any, **kwargs: Any) -> int:
    """Two products of every query head with the keys that it sees, half of them under a causal mask."""
    causal = any(x is True for x in rest)
    return 4 * query.numel() * key.shape[-2] // (2 if causal else 1)


def _attention_backward_flops(grad: Any, query: Any, key: Any, *rest: Any, **kwargs: Any) -> int:
    """Five products in place of two (Dao et al. 2022, arXiv 2205.14135, section 3)."""
    return _attention_flops(query, key, *rest) * 5 // 2


_FLOPS = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def _tensors(value: Any) -> list[torch.Tensor]:
    """Tensors in an operator's arguments or results, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in _tensors(item)]


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes behind tensors, each storage once."""
    return sum({s._cdata: s.nbytes() for s in (x.untyped_storage() for x in tensors)}.values())


def _group_ranks(args: tuple) -> tuple[int, ...]:
    boxed = next(x for x in args if isinstance(x, torch.ScriptObject) and "ProcessGroup" in x._type().name())
    return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(boxed)))


class _Storages:
    """What is known of storages while they live."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref, Any]] = {}

    def get(self, storage: torch.UntypedStorage) -> Any:
        """None for one that nothing is known of."""
        entry = self._known.get(storage._cdata)
        return entry[1] if entry is not None and entry[0]() is storage else None

    def put(self, storage: torch.UntypedStorage, value: Any, gone: Any = None) -> None:
        """Know ``value`` of it; ``gone`` is called when it is freed."""
        key = storage._cdata

        def forget(ref: weakref.ref) -> None:
            if gone is not None:
                gone()
            if key in self._known and self._known[key][0] is ref:
                del self._known[key]

        self._known[key] = (weakref.ref(storage, forget), value)

    def drop(self, storage: torch.UntypedStorage) -> None:
        """Know nothing of it any more."""
        self._known.pop(storage._cdata, None)


def _release(trace: Trace, size: int) -> None:
    trace.live -= size


class Tracing(TorchDispatchMode):
    """Within the context, everything goes into :attr:`trace`."""

    def __init__(self) -> None:
        """A new, empty trace."""
        super().__init__()
        self.trace = Trace()
        self._counted = _Storages()
        self._values = _Storages()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Called by torch with every operator."""
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs)
        inputs = _tensors((args, kwargs))
        meta = any(x.device.type == "meta" for x in inputs)
        out = self._read(func, args, kwargs) if meta else NotImplemented
        if out is NotImplemented:
            out = func(*args, **kwargs)
        formula = _FLOPS.get(func._overloadpacket)
        if formula is not None:
            self.trace.flops += formula(*args, **kwargs, out_val=out)
        outputs = _tensors(out)
        self.trace.operators += not func.is_view
        self._count(inputs, outputs)
        if meta or any(x.device.type == "meta" for x in outputs):
            self._remember(func, args, kwargs, inputs, outputs)
        return out

    def _count(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        """Count new memory, until it is freed."""
        trace, old = self.trace, None
        for tensor in outputs:
            if tensor.is_mkldnn:  # oneDNN's own memory, of a copy of a weight
                continue
            storage = tensor.untyped_storage()
            if self._counted.get(storage) is not None:
                continue
            if old is None:
                old = {x.untyped_storage()._cdata for x in inputs if not x.is_mkldnn}
            if storage._cdata in old:  # a view, or written in place: memory that was there before
                continue
            size = storage.nbytes()
            trace.live += size
            trace.peak = max(trace.peak, trace.live)
            self._counted.put(storage, True, partial(_release, trace, size))

    def _collective(self, func: Any, args: tuple, kwargs: dict) -> Any:
        operation = _COLLECTIVES.get(func._schema.name.partition("::")[2])
        if operation is not None:
            key = Collective(operation, _group_ranks(args))
            sides = [sum(x.numel() * x.element_size() for x in _tensors(a)) for a in args]
            self.trace.bytes[key] += max(sides)
            self.trace.calls[key] += 1
        if not any(x.device.type == "meta" for x in _tensors(args)):
            return func(*args, **kwargs)
        if operation == "all-gather":
            self._gather_values(*args[:2])
        work = FakeWork().boxed()  # c10d has kernels of some of its operators only
        return work if len(func._schema.returns) == 1 else (args[0], work)

    # ---- values of meta tensors -------------------------------------------------------------------------------

    def _value(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """What a tensor holds, on the CPU; None when that is not known."""
        if tensor.device.type != "meta":
            return tensor if tensor.numel() <= _SMALL else None
        flat = self._values.get(tensor.untyped_storage())
        if flat is None:
            return None
        return flat.view(tensor.dtype).as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())

    def _know(self, tensor: torch.Tensor, value: torch.Tensor | None) -> None:
        storage = tensor.untyped_storage()
        if value is None or storage.nbytes() > _SMALL * tensor.element_size():
            self._values.drop(storage)
            return
        flat = torch.zeros(storage.nbytes() // tensor.element_size(), dtype=tensor.dtype)
        flat.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset()).copy_(value)
        self._values.put(storage, flat)

    def _read(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """The answer to an operator that brings values of a meta tensor to the host."""
        source = args[1] if func is _aten.copy_.default else args[0]
        if func is _aten._local_scalar_dense.default:
            value = self._value(source)
            return value.item() if value is not None else torch.zeros((), dtype=source.dtype).item()
        to_cpu = func is _aten._to_copy.default and kwargs.get("device", source.device) == _CPU
        if to_cpu or (func is _aten.copy_.default and args[0].device == _CPU):
            value = self._value(source)
            value = torch.zeros(source.shape, dtype=source.dtype) if value is None else value
            return value.to(kwargs.get("dtype") or source.dtype, copy=True) if to_cpu else args[0].copy_(value)
        return NotImplemented

    def _remember(
        self, func: Any, args: tuple, kwargs: dict, inputs: list[torch.Tensor], outputs: list[torch.Tensor]
    ) -> None:
        """Follow small values through an operator, by running it on them too."""
        outputs, mutates = [x for x in outputs if x.device.type == "meta"], func._schema.is_mutable
        unknown = torch.Tag.nondeterministic_seeded in func.tags or "empty" in func._schema.name
        values = [None] if unknown or any(x.numel() > _SMALL for x in outputs) else [self._value(x) for x in inputs]
        if any(value is None for value in values):
            for x in outputs if mutates else ():
                self._values.drop(x.untyped_storage())
            return
        fresh = [x for x in outputs if all(x.untyped_storage() is not y.untyped_storage() for y in inputs)]
        if not outputs or not (fresh or mutates):
            return  # a view, whose storage is known
        known = iter(values)
        here = tree_map_only(torch.Tensor, lambda _: next(known), (args, kwargs))
        options = {k: _CPU if k == "device" else v for k, v in here[1].items()}
        for x, value in zip(outputs, _tensors(func(*here[0], **options)), strict=False):
            if any(x is y for y in fresh):
                self._know(x, value)

    def _gather_values(self, outputs: Any, inputs: Any) -> None:
        """The peers of a simulated world say what this rank says."""
        for source in _tensors(inputs):
            value = self._value(source)
            for out in _tensors(outputs):
                if out.device.type == "meta":
                    fits = value is not None and out.numel() % max(value.numel(), 1) == 0 and value.numel()
                    whole = value.flatten().repeat(out.numel() // value.numel()).view(out.shape) if fits else None
                    self._know(out, whole)
