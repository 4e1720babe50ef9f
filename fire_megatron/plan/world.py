"""A world of any size in one process: every rank's groups without a peer behind them, tensors without memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.optimizer import clip_grads
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch.optim import adam
from torch.testing._internal.distributed.fake_pg import FakeStore

from fire_megatron.parallel.grid import GridFactory
from fire_megatron.platform import compute_device, simulate


class SimulatedGrids(GridFactory):
    """Makes this rank's own groups only: nobody waits for the others'."""

    def __init__(self) -> None:
        """Nothing is waited for."""
        super().__init__(timeout=1.0)

    def _new_group(self, enumeration: list[list[int]]) -> dist.ProcessGroup | None:
        rank = dist.get_rank()
        return next((dist.new_group(ranks) for ranks in enumeration if rank in ranks), None)


@contextlib.contextmanager
def simulated_rank(rank: int, size: int) -> Iterator[None]:
    """Be this rank of a world of ``size``. Collectives return at once and change nothing."""
    simulate()
    dist.init_process_group("cpu:fake,meta:fake", rank=rank, world_size=size, store=FakeStore())
    try:
        with _meta_kernels():
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


_REPLACED = (
    (F, "scaled_dot_product_attention", _attention),
    (clip_grads, "l2_norm_impl", _norm),
    (adam, "_device_dtype_check_for_fused", lambda *args, **kwargs: None),  # there is a fused kernel of meta tensors
)


@contextlib.contextmanager
def _meta_kernels() -> Iterator[None]:
    kept = [getattr(module, name) for module, name, _ in _REPLACED]
    try:
        for module, name, kernel in _REPLACED:
            setattr(module, name, kernel)
        yield
    finally:
        for (module, name, _), kernel in zip(_REPLACED, kept, strict=True):
            setattr(module, name, kernel)


@contextlib.contextmanager
def stages_send(tokens: list[int], width: int) -> Iterator[None]:
    """Within the context, pipeline stages receive micro-batches of so many tokens (this rank's part), one after the
    other in both directions, which they are told in a message of the neighbour's that is not there."""
    real = P2PCommunicator._communicate_shapes
    shapes = [iter([[n, 1, width] for n in tokens]) for _ in range(2)]

    def communicate_shapes(self: Any, send_next: Any, send_prev: Any, recv_prev: bool, recv_next: bool) -> Any:
        real(self, send_next, send_prev, recv_prev, recv_next)
        nothing = [0, 0, 0]
        return tuple(next(s) if wanted else nothing for s, wanted in zip(shapes, (recv_prev, recv_next), strict=True))

    P2PCommunicator._communicate_shapes = communicate_shapes
    try:
        yield
    finally:
        P2PCommunicator._communicate_shapes = real
