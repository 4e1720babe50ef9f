"""Host memory on its way to and from a GPU: pinned, so that copies run at full speed and the host does not wait."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fire_megatron.platform.device import compute_device

_LEAST = 2**26
"""Bytes of the first pinned block; each later one doubles what there is. Torch rounds pinned memory up to powers of
two, and pinning takes time, so blocks are few and large."""
_ALIGN = 256


def _pinned(size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, pin_memory=True)


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
        flat = [torch.cat(flat, out=_pinned(sum(map(len, flat)), dtype))]
    result = torch.empty(sum(map(len, flat)), dtype=dtype, device=device)
    for part, place in zip(flat, result.split([len(part) for part in flat]), strict=True):
        place.copy_(part, non_blocking=True)
    return result


class HostMemory:
    """Host memory that is lent piece by piece and taken back as a whole, to be lent again: pinned beside a GPU."""

    def __init__(self) -> None:
        """Holds nothing yet."""
        self._blocks: list[torch.Tensor] = []
        self._block = self._used = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory for a tensor until :meth:`reset`; what is in it is undefined."""
        if compute_device().type != "cuda":
            return torch.empty(shape, dtype=dtype)
        size = math.prod(shape) * dtype.itemsize
        while self._block < len(self._blocks) and self._used + size > len(self._blocks[self._block]):
            self._block, self._used = self._block + 1, 0
        if self._block == len(self._blocks):
            power = 1 << (size - 1).bit_length() if size else 1
            self._blocks.append(_pinned(max(_LEAST, power, sum(map(len, self._blocks))), torch.uint8))
            self._used = 0
        start = self._used
        self._used += -(-size // _ALIGN) * _ALIGN
        return self._blocks[self._block][start : start + size].view(dtype).view(*shape)

    def copy(self, values: torch.Tensor, *, wait: bool) -> torch.Tensor:
        """A contiguous copy of a tensor on the device. Without ``wait`` it is there when the device has got to it,
        which its own later work may count on and the host may not."""
        return self.take(values.shape, values.dtype).copy_(values, non_blocking=not wait)

    def reset(self) -> None:
        """Take everything back. Copies still to come that the device has been told of are safe, as long as they and
        those into the memory lent next are in one stream."""
        self._block = self._used = 0
