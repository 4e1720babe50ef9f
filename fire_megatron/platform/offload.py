"""Device memory lent to others: tensors wait in host memory and come back to the same place in every view of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

_PIECE = 2**30
"""Bytes of a copy on the host: torch's pinned memory comes in powers of two, and the buffers of a model are few."""


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
        self._copies: dict[int, tuple[torch.UntypedStorage, list[torch.Tensor]]] = {}
        self._emptied: list[tuple[torch.UntypedStorage, int]] = []
        self.away = False
        """Whether the tensors are on the host."""

    def leave(self) -> None:
        """Give the memory up; a no-op when it has been."""
        if self.away:
            return
        copies = {}
        for key, storage in _storages(self._tensors()).items():
            pieces = self._copies[key][1] if key in self._copies else None
            if pieces is None or not self._constant:
                pieces = pieces or [
                    torch.empty(len(part), dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
                    for part in _bytes(storage).split(_PIECE)
                ]
                for piece, part in zip(pieces, _bytes(storage).split(_PIECE), strict=True):
                    piece.copy_(part)
            copies[key] = storage, pieces
        self._copies = copies  # without those of tensors that are no more
        scratch = {key: s for key, s in _storages(self._scratch()).items() if key not in copies}
        self._emptied = [(storage, storage.nbytes()) for storage in scratch.values()]
        for storage in (*(storage for storage, _ in copies.values()), *scratch.values()):
            storage.resize_(0)
        self.away = True

    def come_back(self) -> None:
        """Take the memory again, with what was in it; a no-op when the tensors are here."""
        if not self.away:
            return
        for storage, pieces in self._copies.values():
            storage.resize_(sum(map(len, pieces)))
            for piece, part in zip(pieces, _bytes(storage).split(_PIECE), strict=True):
                part.copy_(piece, non_blocking=True)
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
