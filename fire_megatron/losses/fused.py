"""The output layer and the loss as one operation over chunks of tokens, so that full logits never exist.

A chunk's logits are projected, the loss is computed on them and differentiated, and their gradient goes at once into
those of the hidden states and of the weight. Nothing is projected twice: beside the products that cannot be avoided
(logits, and the two gradients) there is only one chunk's logits in memory. The gradients therefore exist from forward
on: [N, H] and [V, H].

On a CPU, half-precision weights are multiplied as float32, tile by tile: without matrix units of its own a CPU is
slower in bfloat16, and logits and sums then carry no rounding of it. On a GPU the products are in the weight's dtype.

Shapes: N tokens, H hidden size, V rows of this shard of the output weight, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fire_megatron.platform import device_kind

TokenLoss = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]
"""``(logits_CV, which tokens) -> (scalar, report_RC)``: the chunk's share of the loss, differentiable with respect to
the logits, and R numbers a token to be reported, without gradient. It may let backward write over the logits."""

_CHUNK = {"cpu": (2**26, 256), "cuda": (2**28, 8192)}
"""Most logits and most tokens of a chunk: enough for the products to run at full speed. Round numbers of tokens, which
matrix products like."""
_TILE_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
"""Elements of a weight, or of its gradient, that exist in another dtype at a time."""


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
    elements, most = _CHUNK.get(device_kind(device), _CHUNK["cuda"])
    most = chunk_tokens or max(1, min(most, elements // max(columns, 1)))
    slices, first = [], 0
    for length in segments or [tokens]:
        last = first + length
        slices += [slice(start, min(start + most, last)) for start in range(first, last, most)]
        first = last
    return slices


def _tiles(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    step = max(1, _TILE_ELEMENTS.get(device_kind(device), _TILE_ELEMENTS["cuda"]) // max(width, 1))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


class OutputLayer:
    """This rank's rows of an output weight, with the memory for one chunk of logits."""

    def __init__(self, weight_VH: torch.Tensor, columns: int | None = None, dtype: torch.dtype | None = None) -> None:
        """Args:
        weight_VH: [V, H].
        columns: rows that stand for a token; vocabulary padding after them is not projected. None for all.
        dtype: of the products; None picks it: the weight's on a GPU, at least float32 on a CPU.
        """
        self.weight_VH = weight_VH.detach()
        self.columns = len(weight_VH) if columns is None else columns
        widest = torch.promote_types(weight_VH.dtype, torch.float32)
        self.dtype = dtype or (widest if device_kind(weight_VH.device) == "cpu" else weight_VH.dtype)
        self._buffer = torch.empty(0, dtype=self.dtype, device=weight_VH.device)

    def _rows(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """The rows that stand for a token in the products' dtype; one tile at a time where that is not the weight's."""
        if self.dtype == self.weight_VH.dtype:
            yield slice(0, self.columns), self.weight_VH[: self.columns]
            return
        for tile in _tiles(self.columns, self.weight_VH.shape[1], self.weight_VH.device):
            yield tile, self.weight_VH[tile].to(self.dtype)

    def logits(self, hidden_CH: torch.Tensor) -> torch.Tensor:
        """[C, H] -> [C, columns] in the products' dtype, without gradient, in memory that the next call takes."""
        size = len(hidden_CH) * self.columns
        if self._buffer.numel() < size:
            self.release()  # before more is asked for
            self._buffer = self._buffer.new_empty(size)
        logits_CV = self._buffer[:size].view(len(hidden_CH), self.columns)
        hidden_CH = hidden_CH.detach().to(self.dtype)
        for tile, weight in self._rows():
            torch.mm(hidden_CH, weight.t(), out=logits_CV[:, tile])
        return logits_CV

    @property
    def held(self) -> int:
        """Logits that there is memory for."""
        return self._buffer.numel()

    def release(self) -> None:
        """Let go of the memory for logits; the next call takes it anew."""
        self._buffer = self._buffer.new_empty(0)

    def hidden_gradient(self, grad_CV: torch.Tensor, out_CH: torch.Tensor) -> None:
        """Write the gradient of a chunk's hidden states, from that of its logits."""
        if self.dtype == out_CH.dtype:
            torch.mm(grad_CV, self.weight_VH[: self.columns], out=out_CH)
            return
        total = torch.zeros(out_CH.shape, dtype=self.dtype, device=out_CH.device)
        for tile, weight in self._rows():
            total.addmm_(grad_CV[:, tile], weight)
        out_CH.copy_(total)

    def add_weight_gradient(self, grad_CV: torch.Tensor, hidden_CH: torch.Tensor, total_VH: torch.Tensor) -> None:
        """Add the gradient of the weight, from that of a chunk's logits, to a sum of at least float32."""
        hidden_CH = hidden_CH.detach().to(self.dtype)
        if self.dtype == total_VH.dtype:
            total_VH[: self.columns].addmm_(grad_CV.t(), hidden_CH)
            return
        # A half-precision product cannot add to a float32 sum.
        for tile in _tiles(self.columns, hidden_CH.shape[1], hidden_CH.device):
            total_VH[tile] += grad_CV[:, tile].t() @ hidden_CH


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
    product_dtype: torch.dtype | None = None,
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
        product_dtype: see :class:`OutputLayer`.

    Returns:
        The loss, a scalar of at least float32, and the reports [R, N].
    """
    if not torch.is_grad_enabled():
        hidden_NH, weight_VH = hidden_NH.detach(), weight_VH.detach()
    parts = chunks(len(hidden_NH), len(weight_VH), hidden_NH.device, chunk_tokens, segments) or [slice(0, 0)]
    layer = OutputLayer(weight_VH, columns, product_dtype)
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
        widest = torch.promote_types(weight_VH.dtype, torch.float32)
        grad_VH = torch.zeros_like(weight_VH, dtype=widest) if for_weight else None
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
            if grad_NH is not None:
                layer.hidden_gradient(grad_CV, grad_NH[part])
            if grad_VH is not None:
                layer.add_weight_gradient(grad_CV, hidden_NH[part], grad_VH)
            del loss, report_RC, logits_CV, grad_CV  # before the next chunk's
        layer.release()
        # Saved tensors are let go of before the weight's gradient is accumulated, which can then take their memory.
        ctx.save_for_backward(grad_NH, None if grad_VH is None else grad_VH.to(weight_VH.dtype))
        report_RN = torch.cat(reports, -1)
        ctx.mark_non_differentiable(report_RN)
        return torch.stack(losses).sum(), report_RN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple:
        # A training step's scale is 1, where multiplying would only copy the weight's gradient.
        scale = grad.item()  # a number, since a scalar tensor would be rounded to the gradients' dtype
        scaled = (g if g is None or scale == 1 else g * scale for g in ctx.saved_tensors)
        return (*scaled, None, None, None)
