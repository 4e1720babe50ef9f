"""The output layer and the loss as one operation over chunks of tokens, so that full logits never exist.

A chunk's logits are projected, the loss is computed on them and differentiated, and their gradient goes at once into
those of the hidden states and of the weight. Nothing is projected twice: beside the products that cannot be avoided
(logits, and the two gradients) there is only one chunk's logits in memory. The gradients therefore exist from forward
on: [N, H] and [V, H].

Logits and the weight's gradient while it is summed up are float32 in half precision too; losses/products.py says how.

Shapes: N tokens, H hidden size, V rows of this shard of the output weight, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fire_megatron.losses.products import add_weight_gradient, as_factor, hidden_gradient, project, sum_dtype
from fire_megatron.platform.device import device_kind

TokenLoss = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]
"""``(logits_CV, which tokens) -> (scalar, report_RC)``: the chunk's share of the loss, differentiable with respect to
the logits, and F figures a token to be reported, without gradient. It may let backward write over the logits."""

_CHUNK = {"cpu": (2**26, 256, 1), "cuda": (2**27, 8192, 64)}
"""Most logits and most tokens of a chunk, enough for the products to run at full speed, and what its tokens are a
multiple of where there are more. On a GPU these logits take half a GiB, and their gradient as a factor a quarter."""


def chunks(
    tokens: int, columns: int, device: torch.device, chunk_tokens: int = 0, segments: Sequence[int] = ()
) -> list[slice]:
    """Slices of the tokens, all but the last of a segment of one length; none crosses the border of two segments.

    Args:
        tokens: N.
        columns: V, alike on all ranks that share the vocabulary, so that they cut alike.
        device: whose memory is to be used.
        chunk_tokens: most tokens of a chunk; 0 picks a number for the device.
        segments: lengths that add up to N.
    """
    assert not segments or sum(segments) == tokens, (segments, tokens)
    elements, most, multiple = _CHUNK.get(device_kind(device), _CHUNK["cuda"])
    most = min(most, elements // max(columns, 1))
    most = chunk_tokens or max(1, most - most % multiple if most > multiple else most)
    slices, first = [], 0
    for length in segments or [tokens]:
        last = first + length
        slices += [slice(start, min(start + most, last)) for start in range(first, last, most)]
        first = last
    return slices


class OutputLayer:
    """This rank's rows of an output weight, with the memory for one chunk of logits."""

    def __init__(self, weight_VH: torch.Tensor, columns: int | None = None, *, temperature: float = 1.0) -> None:
        """Args:
        weight_VH: [V, H].
        columns: rows that stand for a token; vocabulary padding after them is not projected. None for all.
        temperature: divides the logits.
        """
        self.temperature = temperature
        self.columns = len(weight_VH) if columns is None else columns
        self.weight_VH = weight_VH.detach()
        self._buffer = torch.empty(0, dtype=sum_dtype(weight_VH.dtype), device=weight_VH.device)

    def logits(self, hidden_CH: torch.Tensor) -> torch.Tensor:
        """[C, H] -> [C, columns] at least float32, without gradient, in memory that the next call takes."""
        size = len(hidden_CH) * self.columns
        if self._buffer.numel() < size:
            self.release()  # before more is asked for
            self._buffer = self._buffer.new_empty(size)
        logits_CV = self._buffer[:size].view(len(hidden_CH), self.columns)
        project(hidden_CH.detach(), self._used, logits_CV)
        return logits_CV if self.temperature == 1 else logits_CV.mul_(1 / self.temperature)

    @property
    def _used(self) -> torch.Tensor:
        return self.weight_VH[: self.columns]

    @property
    def held(self) -> int:
        """Logits that there is memory for."""
        return self._buffer.numel()

    def release(self) -> None:
        """Release the memory for logits; the next call allocates it again."""
        self._buffer = self._buffer.new_empty(0)

    def add_gradients(
        self,
        grad_CV: torch.Tensor,
        hidden_CH: torch.Tensor,
        out_CH: torch.Tensor | None,
        total_VH: torch.Tensor | None,
    ) -> None:
        """From the gradient of a chunk's logits, write that of its hidden states and add that of the weight to a sum;
        of either only where there is memory for it, perhaps overwriting the former. See losses/products.py for the
        formats."""
        if self.temperature != 1:
            grad_CV = grad_CV.mul_(1 / self.temperature)
        factor_CV = as_factor(grad_CV, self.weight_VH)
        if out_CH is not None:
            hidden_gradient(factor_CV, self._used, out_CH)
        if total_VH is not None:
            add_weight_gradient(factor_CV, hidden_CH.detach(), total_VH[: self.columns])


@torch.no_grad()
def map_chunks(
    hidden_NH: torch.Tensor,
    layer: OutputLayer,
    function: Callable[[torch.Tensor, slice], torch.Tensor],
    *,
    chunk_tokens: int = 0,
) -> torch.Tensor:
    """Score without gradient: ``function(logits_CV, which tokens) -> [..., C]`` on every chunk, put together [..., N].

    Called at least once, with no tokens when there are none.
    """
    parts = chunks(len(hidden_NH), len(layer.weight_VH), hidden_NH.device, chunk_tokens) or [slice(0, 0)]
    return torch.cat([function(layer.logits(hidden_NH[part]), part) for part in parts], -1)


def chunked_linear_loss(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    token_loss: TokenLoss,
    *,
    columns: int | None = None,
    segments: Sequence[int] = (),
    chunk_tokens: int = 0,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of a loss over tokens, from hidden states and the output weight, with the gradients of both.

    Collectives are those of ``token_loss``, once a chunk, all in forward. The weight's gradient is summed up over
    chunks in float32. The hidden states' gradient is this shard's part of a sum over the shards, which the
    communication around this call completes.

    Args:
        hidden_NH: [N, H] final hidden states of the tokens that count; N may be 0.
        weight_VH: [V, H] this shard of the output weight, of the same dtype.
        token_loss: see :data:`TokenLoss`; called at least once, with no tokens when there are none.
        columns: rows of the weight that stand for a token; the others are vocabulary padding, with gradient 0. None
            for all.
        segments: lengths, adding up to N, within which a chunk has to stay.
        chunk_tokens: most tokens of a chunk; 0 picks a number for the device.

    Returns:
        The loss, a scalar of at least float32, and the reports [F, N].
    """
    if not torch.is_grad_enabled():
        hidden_NH, weight_VH = hidden_NH.detach(), weight_VH.detach()
    parts = chunks(len(hidden_NH), len(weight_VH), hidden_NH.device, chunk_tokens, segments) or [slice(0, 0)]
    layer = OutputLayer(weight_VH, columns, temperature=temperature)
    return _ChunkedLinearLoss.apply(hidden_NH, weight_VH, layer, token_loss, parts)


class _ChunkedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        layer: OutputLayer,
        token_loss: TokenLoss,
        parts: Sequence[slice],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        needed = for_hidden or for_weight
        grad_NH = torch.empty_like(hidden_NH) if for_hidden else None
        grad_VH = torch.zeros_like(weight_VH, dtype=sum_dtype(weight_VH.dtype)) if for_weight else None
        losses, reports = [], []
        for part in parts:
            logits_CV = layer.logits(hidden_NH[part])
            with torch.set_grad_enabled(needed):
                logits_CV.requires_grad_(needed)
                loss, report_RC = token_loss(logits_CV, part)
            losses.append(loss.detach())
            reports.append(report_RC.detach())
            if not needed:
                continue
            (grad_CV,) = torch.autograd.grad(loss, logits_CV)
            layer.add_gradients(grad_CV, hidden_NH[part], None if grad_NH is None else grad_NH[part], grad_VH)
            del loss, report_RC, logits_CV, grad_CV  # before the next chunk's
        layer.release()
        # Saved tensors are let go of before the weight's gradient is accumulated, which can then take their memory.
        ctx.save_for_backward(grad_NH, grad_VH)
        ctx.dtypes = hidden_NH.dtype, weight_VH.dtype
        report_FN = torch.cat(reports, -1)
        ctx.mark_non_differentiable(report_FN)
        return torch.stack(losses).sum(), report_FN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple:
        scaled = (
            None if values is None else _scaled(values, grad, dtype)
            for values, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None)


def _scaled(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values times a scalar, rounded to a dtype once. The values stay as they are, for another backward."""
    # A training step's scale is 1. To ask for it costs nothing on a CPU; on a GPU the host would wait for the device,
    # where the multiplication is part of the conversion to half precision.
    if device_kind(scale.device) == "cpu" and scale.item() == 1:
        return values.to(dtype)
    # Of one dimension, since a scalar tensor would be rounded to the values' dtype before it is multiplied by.
    return torch.mul(values, scale.view(1), out=torch.empty_like(values, dtype=dtype))
