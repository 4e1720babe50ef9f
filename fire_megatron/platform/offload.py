"""Device memory lent to others: tensors wait in host memory and come back to the same place in every view of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

_BLOCK = 2**30
"""Bytes of a block of host memory. torch's pinned memory comes in powers of two, so that copies of single tensors would
take up to twice what is in them."""
_ALIGNMENT = 512
"""Bytes that a tensor's place in it is a multiple of, as in device memory."""


class HostBlocks:
    """Host memory in a few large blocks, addressed as if it were one."""

    def __init__(self) -> None:
        """None yet."""
        self._blocks: list[torch.Tensor] = []

    @property
    def bytes(self) -> int:
        """Of all blocks."""
        return sum(map(len, self._blocks))

    def fit(self, size: int, *, pinned: bool) -> None:
        """Have at least so many bytes, and less than a block above them: what is missing is added, in whole blocks and
        a power of two for the rest; blocks that nothing needs go. What stays keeps its address and content."""
        while self._blocks and self.bytes - len(self._blocks[-1]) >= size:
            self._blocks.pop()
        while (missing := size - self.bytes) > 0:
            length = min(_BLOCK, 1 << (max(missing, _ALIGNMENT) - 1).bit_length())
            self._blocks.append(torch.empty(length, dtype=torch.uint8, pin_memory=pinned))

    def parts(self, start: int, size: int) -> Iterator[torch.Tensor]:
        """Views that are, one after the other, the bytes from ``start`` on."""
        for block in self._blocks:
            if start < len(block) and size:
                part = block[start : start + size]
                yield part
                size -= len(part)
                start = 0
            else:
                start -= len(block)


@dataclass(frozen=True)
class _Place:
    """Where a storage waits."""

    storage: torch.UntypedStorage
    start: int
    size: int


class Offload:
    """Moves the memory of some tensors to the host and back.

    The tensors themselves stay, so that every module, optimizer and buffer that views them goes on without notice:
    only their storage is emptied and filled again.
    """

    def __init__(
        self,
        tensors: Callable[[], Iterable[torch.Tensor]],
        *,
        constant: bool,
        scratch: Callable[[], Iterable[torch.Tensor]] = tuple,
    ) -> None:
        """Args: tensors: which; asked anew whenever they leave, since an optimizer makes its state late; constant: they
        never change, so that one copy on the host serves for good; scratch: more tensors, which come back as zeros."""
        self._tensors, self._constant, self._scratch = tensors, constant, scratch
        self._host = HostBlocks()
        self._places: dict[int, _Place] = {}
        self._emptied: list[tuple[torch.UntypedStorage, int]] = []
        self.away = False
        """Whether the tensors are on the host."""

    def leave(self) -> None:
        """Give the memory up; a no-op when it has been."""
        if self.away:
            return
        storages = _storages(self._tensors())
        if not self._constant or storages.keys() != self._places.keys():
            self._copy(storages)
        scratch = {key: s for key, s in _storages(self._scratch()).items() if key not in storages}
        self._emptied = [(storage, storage.nbytes()) for storage in scratch.values()]
        for storage in (*storages.values(), *scratch.values()):
            storage.resize_(0)
        self.away = True

    def _copy(self, storages: dict[int, torch.UntypedStorage]) -> None:
        """To the host, in place of what is there."""
        self._places, end = {}, 0
        for key, storage in storages.items():
            self._places[key] = _Place(storage, end, storage.nbytes())
            end += storage.nbytes() + -storage.nbytes() % _ALIGNMENT
        self._host.fit(end, pinned=any(storage.device.type == "cuda" for storage in storages.values()))
        for place in self._places.values():
            for here, there in self._pairs(place):
                there.copy_(here)

    def _pairs(self, place: _Place) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Bytes of a storage, and where they wait."""
        here, first = _bytes(place.storage), 0
        for there in self._host.parts(place.start, place.size):
            yield here[first : first + len(there)], there
            first += len(there)
        assert first == place.size, (first, place.size)

    def come_back(self) -> None:
        """Take the memory again, with what was in it; a no-op when the tensors are here."""
        if not self.away:
            return
        for place in self._places.values():
            place.storage.resize_(place.size)
            for here, there in self._pairs(place):
                here.copy_(there, non_blocking=True)
        for storage, size in self._emptied:
            storage.resize_(size)
            _bytes(storage).zero_()
        self.away = False


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    """By identity; tensors that view the same memory have one."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage for storage in storages if storage.nbytes()}


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
