"""Host memory on its way to and from a GPU: pinned, so that copies run at full speed and the host does not wait."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from fire_megatron.platform.device import compute_device

_LEAST, _MOST = 2**26, 2**30
"""Bytes of a block, which is larger only for a tensor that is. Torch rounds pinned memory up to powers of two, each
allocation by itself, and pinning takes time: so blocks are powers of two, and few."""
_ALIGN = 512
"""Bytes that the start of every piece is a multiple of, as in device memory."""


def _allocate(size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, pin_memory=compute_device().type == "cuda")


def upload(parts: Sequence[torch.Tensor], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Lay tensors end to end on a device. The host does not wait for it.

    Args:
        parts: of ``dtype`` and any shapes. From pinned memory each crosses as it is, and must not change before the
            device has got to it; others are first put together in pinned memory.
        dtype: theirs.
        device: where to.

    Returns:
        1-D.
    """
    flat = [part.reshape(-1) for part in parts]
    if device.type == "cuda" and not all(part.is_cuda or part.is_pinned() for part in flat):
        flat = [torch.cat(flat, out=_allocate(sum(map(len, flat)), dtype))]
    result = torch.empty(sum(map(len, flat)), dtype=dtype, device=device)
    for part, place in zip(flat, result.split([len(part) for part in flat]), strict=True):
        place.copy_(part, non_blocking=True)
    return result


class HostMemory:
    """Host memory in blocks, lent piece by piece and taken back as a whole, to be lent again: pinned beside a GPU."""

    def __init__(self) -> None:
        """Holds nothing yet."""
        self._blocks: list[torch.Tensor] = []
        self.reset()

    @property
    def bytes(self) -> int:
        """Held, lent or not."""
        return sum(map(len, self._blocks))

    def reset(self) -> None:
        """Take everything back. Copies still to come that the device has been told of are safe, as long as they and
        those into the memory lent next are in one stream."""
        self._block = self._used = 0

    def fit(self, sizes: Iterable[int]) -> None:
        """Take everything back; hold what :meth:`spans` of these sizes need and less than a block more."""
        self.reset()
        size = sum(map(_aligned, sizes))
        while self._blocks and self.bytes - len(self._blocks[-1]) >= size:
            self._blocks.pop()
        while self.bytes < size:
            self._add(min(size - self.bytes, _MOST))

    def spans(self, size: int) -> list[torch.Tensor]:
        """Memory of so many bytes until :meth:`reset`: one view after the other, over the borders of blocks, so that
        nothing is lost at them; what is in it is undefined."""
        parts: list[torch.Tensor] = []
        while size:
            if self._block == len(self._blocks):
                self._add(min(size, _MOST))
            block = self._blocks[self._block]
            parts.append(block[self._used : self._used + size])
            size -= len(parts[-1])
            self._used += _aligned(len(parts[-1]))
            if self._used == len(block):
                self._block, self._used = self._block + 1, 0
        return parts

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory for a tensor until :meth:`reset`, in one piece; what is in it is undefined. Without a GPU it is new,
        since it need not be pinned, and the caller's for good."""
        if compute_device().type != "cuda":
            return torch.empty(shape, dtype=dtype)
        size = math.prod(shape) * dtype.itemsize
        while self._block < len(self._blocks) and self._used + size > len(self._blocks[self._block]):
            self._block, self._used = self._block + 1, 0
        if self._block == len(self._blocks):
            self._add(max(size, min(self.bytes, _MOST)))  # the total is unknown: double it
        [part] = self.spans(max(size, 1))  # also of nothing, which must count as pinned
        return part[:size].view(dtype).view(*shape)

    def copy(self, values: torch.Tensor, *, wait: bool) -> torch.Tensor:
        """A contiguous copy of a tensor on the device. Without ``wait`` it is there when the device has got to it,
        which its own later work may count on and the host may not."""
        return self.take(values.shape, values.dtype).copy_(values, non_blocking=not wait)

    def _add(self, size: int) -> None:
        self._blocks.append(_allocate(1 << (max(size, _LEAST) - 1).bit_length(), torch.uint8))


def _aligned(size: int) -> int:
    return size + -size % _ALIGN
