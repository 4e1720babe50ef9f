"""Device memory lent to others: tensors wait in host memory and come back to the same place in every view of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch


class Offload:
    """Moves the memory of some tensors to the host and back.

    The tensors themselves stay, so that every module, optimizer and buffer that views them goes on without notice:
    only their storage is emptied and filled again.
    """

    def __init__(self, tensors: Callable[[], Iterable[torch.Tensor]], *, constant: bool) -> None:
        """Args: tensors: which; asked anew whenever they leave, since an optimizer makes its state late; constant: they
        never change, so that one copy on the host serves for good."""
        self._tensors, self._constant = tensors, constant
        self._copies: dict[int, tuple[torch.UntypedStorage, torch.Tensor]] = {}
        self.away = False
        """Whether the tensors are on the host."""

    def leave(self) -> None:
        """Give the memory up; a no-op when it has been."""
        if self.away:
            return
        copies = {}
        for key, storage in {t.untyped_storage()._cdata: t.untyped_storage() for t in self._tensors()}.items():
            if key in self._copies:
                copy = self._copies[key][1]
                if not self._constant:
                    copy.copy_(_bytes(storage))
            else:
                copy = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
                copy.copy_(_bytes(storage))
            copies[key] = storage, copy
        self._copies = copies  # without those of tensors that are no more
        for storage, _ in copies.values():
            storage.resize_(0)
        self.away = True

    def come_back(self) -> None:
        """Take the memory again, with what was in it; a no-op when the tensors are here."""
        if not self.away:
            return
        for storage, copy in self._copies.values():
            storage.resize_(copy.numel())
            _bytes(storage).copy_(copy, non_blocking=True)
        self.away = False


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
