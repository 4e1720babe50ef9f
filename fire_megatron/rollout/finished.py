"""Rows on their way out, in groups of one size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Finished = Callable[[Sequence[int], Sequence[torch.Tensor]], None]
"""Called with row ids and responses ([R_i] int64) of a group of rows that are finished."""


class FinishedRows:
    """Collects finished rows and hands them over in groups of one size, the last one smaller."""

    def __init__(self, hand_over: Finished | None, size: int) -> None:
        """Args: hand_over: None hands nothing over; size: rows of a group, 0 for all at once."""
        self._hand_over, self._size = hand_over, size
        self._rows: list[tuple[int, torch.Tensor]] = []

    def add(self, row_id: int, response: torch.Tensor) -> None:
        """A row has got its last token."""
        if self._hand_over is not None:
            self._rows.append((row_id, response))
            if len(self._rows) == self._size:
                self.close()

    def close(self) -> None:
        """Hand over what is left."""
        if self._rows and self._hand_over is not None:
            rows, self._rows = self._rows, []
            self._hand_over([row for row, _ in rows], [response for _, response in rows])
