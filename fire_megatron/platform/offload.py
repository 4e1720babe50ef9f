"""Device memory lent to others: tensors wait in host memory and come back to the same place in every view of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from fire_megatron.platform.host import HostMemory


@dataclass(frozen=True)
class _Place:
    """Where a storage waits."""

    storage: torch.UntypedStorage
    size: int
    parts: list[torch.Tensor]
    """One after the other, its bytes."""


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
        """Args: tensors: which; asked each time they leave, since an optimizer makes its state late; constant: they
        never change, so that one copy on the host serves for good; scratch: more tensors, which come back as zeros."""
        self._tensors, self._constant, self._scratch = tensors, constant, scratch
        self._host = HostMemory()
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
        self._places = {}
        self._host.fit(storage.nbytes() for storage in storages.values())
        for key, storage in storages.items():
            self._places[key] = place = _Place(storage, storage.nbytes(), self._host.spans(storage.nbytes()))
            for here, there in _pairs(place):
                there.copy_(here)

    def come_back(self) -> None:
        """Take the memory again, with what was in it; a no-op when the tensors are here."""
        if not self.away:
            return
        for place in self._places.values():
            place.storage.resize_(place.size)
            for here, there in _pairs(place):
                here.copy_(there, non_blocking=True)
        for storage, size in self._emptied:
            storage.resize_(size)
            _bytes(storage).zero_()
        self.away = False


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    """By identity; tensors that view the same memory have one."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage for storage in storages if storage.nbytes()}


def _pairs(place: _Place) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Bytes of a storage, and where they wait."""
    return zip(_bytes(place.storage).split([len(part) for part in place.parts]), place.parts, strict=True)


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
