"""A world of any size in one process: every rank's groups without a peer behind them, tensors without memory."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.optimizer import clip_grads
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch.optim import adam
from torch.testing._internal.distributed.fake_pg import FakeStore

from fire_megatron.models.layers import RMSNorm
from fire_megatron.parallel.grid import GridFactory
from fire_megatron.platform.device import compute_device
from fire_megatron.platform.launch import simulate


class SimulatedGrids(GridFactory):
    """Makes this rank's own groups only: nobody waits for the others'."""

    def __init__(self) -> None:
        """Nothing is waited for."""
        super().__init__(timeout=1.0)

    def _new_group(self, enumeration: list[list[int]]) -> dist.ProcessGroup | None:
        rank = dist.get_rank()
        return next((dist.new_group(ranks) for ranks in enumeration if rank in ranks), None)


@contextlib.contextmanager
def simulated_rank(rank: int, size: int, kind: str) -> Iterator[None]:
    """Be this rank of a world of ``size``. Collectives return at once and change nothing.

    Args:
        rank: this rank.
        size: ranks of the world.
        kind: ``cpu`` or ``cuda``, the device that the run is planned for.
    """
    with simulate(kind):
        dist.init_process_group("cpu:fake,meta:fake", rank=rank, world_size=size, store=FakeStore())
        try:
            with _meta_kernels(kind):
                yield
        finally:
            dist.destroy_process_group()


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """A fused kernel, as on CPU and GPU; of meta tensors torch would form all scores."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _norm(chunk_size: int, noop: Any, tensors: Any, *options: Any) -> tuple[torch.Tensor, None]:
    """Norm of all of them; megatron-core's own without fused kernels makes a list of numbers of them."""
    return torch.zeros(1, device=compute_device()), None


class _FusedNorm(torch.autograd.Function):
    """A norm in one kernel keeps its input and a number a token."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class _Balanced:
    """Stands for a routing map of experts that get equal numbers of tokens."""

    def __init__(self, routing_map: torch.Tensor, top_k: int) -> None:
        self._rows, self._experts = routing_map.shape
        self._top_k = top_k

    def size(self, dim: int) -> int:
        return (self._rows, self._experts)[dim]

    def sum(self, dim: int) -> torch.Tensor:
        share, extra = divmod(self._rows * self._top_k, self._experts)
        return torch.tensor([share + (i < extra) for i in range(self._experts)], device=compute_device())


_preprocess = MoEAlltoAllTokenDispatcher.preprocess


def _balanced_preprocess(self: Any, routing_map: torch.Tensor) -> torch.Tensor:
    return _preprocess(self, _Balanced(routing_map, self.config.moe_router_topk))


_PADS_EXPERTS = "tokens_per_expert" in inspect.signature(token_dispatcher.permute).parameters
"""Whether this megatron-core's permutation may pad each expert's tokens, and then says how; it is not asked to."""


def _permute(
    tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor, num_out_tokens: int, **_: Any
) -> tuple[torch.Tensor | None, ...]:
    """Each token once for each of its experts."""
    places = torch.zeros(num_out_tokens, dtype=torch.int64, device=tokens.device)
    permuted = tokens.index_select(0, places), probs.t().flatten().index_select(0, places), places
    return (*permuted, None, None) if _PADS_EXPERTS else permuted


_addmm = torch.addmm


def _widening_addmm(
    total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype | None = None, **options: Any
) -> torch.Tensor:
    """Half precision multiplied and added to float32, which torch 2.11 cannot do with meta tensors."""
    if out_dtype is not None:  # wide factors of these shapes, without their memory
        one = total.new_empty(1)
        a, b = one.expand(a.shape), one.expand(b.shape)
    return _addmm(total, a, b, **options)


_tensor = torch.tensor


def _remembered_tensor(data: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
    """By way of the CPU, where a trace sees the values."""
    tensor = _tensor(data, **kwargs)
    return tensor if device is None else tensor.to(device)


_REPLACED = [
    (torch, "tensor", _remembered_tensor),
    (F, "scaled_dot_product_attention", _attention),
    (clip_grads, "l2_norm_impl", _norm),
    (adam, "_device_dtype_check_for_fused", lambda *args, **kwargs: None),  # there is a fused kernel of meta tensors
    (MoEAlltoAllTokenDispatcher, "preprocess", _balanced_preprocess),
    (token_dispatcher, "permute", _permute),
]
_REPLACED_ON_CUDA = [
    (RMSNorm, "forward", lambda self, x: _FusedNorm.apply(x, self.weight)),
    (torch, "addmm", _widening_addmm),
]


@contextlib.contextmanager
def _meta_kernels(kind: str) -> Iterator[None]:
    replaced = _REPLACED + (_REPLACED_ON_CUDA if kind == "cuda" else [])
    kept = [getattr(module, name) for module, name, _ in replaced]
    try:
        for module, name, kernel in replaced:
            setattr(module, name, kernel)
        yield
    finally:
        for (module, name, _), kernel in zip(replaced, kept, strict=True):
            setattr(module, name, kernel)
