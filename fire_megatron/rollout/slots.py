"""Which row is in which slot, and what has been sampled for it: continuous batching on the host.

Rows wait until a slot is free (as in Orca, Yu et al. 2022), so memory is bounded by the slots and a row that ends early
makes room at once. Everything here follows from the sampled tokens, so that every rank of a replica has the same.

Shapes: S slots, n rows of a decode step (slots 0 to n - 1), C columns of a table of new tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class FinishedRow:
    """A row that is finished."""

    row: int
    """Its place among the rows."""
    tokens: torch.Tensor
    """[R] int64."""
    statistics: torch.Tensor
    """[2, R] float32: log-probabilities and entropies; zeros on other stages than the last."""


class Slots:
    """Rows in their order through S slots."""

    def __init__(
        self, prompt_lengths: Sequence[int], slots: int, *, max_new_tokens: int, stop_ids: Collection[int], columns: int
    ) -> None:
        """Args:
        prompt_lengths: tokens of each row's prompt.
        slots: S.
        max_new_tokens: longest response.
        stop_ids: tokens that end one.
        columns: most new tokens of a row between two calls of :meth:`take`.
        """
        self._lengths, self._limit = np.array(prompt_lengths, dtype=np.int64), max_new_tokens
        self._stop = np.array(sorted(stop_ids), dtype=np.int64)
        self._waiting = deque(range(len(prompt_lengths)))
        self.row = np.full(slots, -1)
        """[S] the row in each slot, -1 for none."""
        self.position = np.zeros(slots, dtype=np.int64)
        """[S] tokens sampled of it."""
        # Room for what is sampled beyond a row's end before the host looks.
        self._tokens = np.zeros((slots, max_new_tokens + columns), dtype=np.int64)
        self._statistics = np.zeros((2, slots, max_new_tokens + columns), dtype=np.float32)

    @property
    def active(self) -> np.ndarray:
        """Slots that hold a row, ascending."""
        return np.flatnonzero(self.row >= 0)

    @property
    def busy(self) -> int:
        """Number of slots that hold a row."""
        return int((self.row >= 0).sum())

    @property
    def span(self) -> int:
        """One more than the last slot that holds a row; 0 when none does."""
        active = self.active
        return int(active[-1]) + 1 if len(active) else 0

    @property
    def waiting(self) -> int:
        """Number of rows without a slot."""
        return len(self._waiting)

    def admit(self) -> list[tuple[int, int]]:
        """Give free slots to waiting rows, in order; returns (slot, row) of each."""
        admitted = []
        for slot in np.flatnonzero(self.row < 0)[: len(self._waiting)].tolist():
            self.row[slot], self.position[slot] = self._waiting.popleft(), 0
            admitted.append((slot, int(self.row[slot])))
        return admitted

    def steps(self, most: int) -> int:
        """Decode steps until the host has to look: ``most``, or until every row has reached its limit, when each has
        the token that follows its prompt."""
        active = self.active
        if not len(active):
            return 0
        return min(most, self._limit - max(1, int(self.position[active].min())))

    def cached(self, steps: int) -> int:
        """Tokens of the longest row in the cache after so many steps, of those that count."""
        active = self.active
        if not len(active):
            return 1
        after = np.minimum(np.maximum(self.position[active], 1) - 1 + steps, self._limit - 1)
        return int((self._lengths[self.row[active]] + after).max())

    def places(self, rows: int, columns: int) -> np.ndarray:
        """[n, columns] each slot's positions of the next tokens: the first column is for the token that follows a
        prompt, the others are for decode steps."""
        position = self.position[:rows, None]
        return position - (position > 0) + np.arange(columns)

    def take(self, table: np.ndarray, admitted: Sequence[int]) -> tuple[int, list[FinishedRow]]:
        """Take note of what has been sampled.

        Args:
            table: [3, n, C] new tokens, their log-probabilities and entropies; the first column counts for admitted
                rows only.
            admitted: slots of the rows that have been prefilled since the last call.

        Returns:
            How many of the tokens belong to a response, and the rows that have ended, whose slots are free now.
        """
        tokens, counted, answers = table[0].astype(np.int64), 0, []
        fresh = np.array(admitted, dtype=np.int64)
        for first, slots in ((0, fresh), (1, np.setdiff1d(self.active, fresh))):
            new = tokens[slots, first:]
            if not new.size:
                continue
            start, width = self.position[slots], new.shape[1]
            columns = start[:, None] + np.arange(width)
            self._tokens[slots[:, None], columns] = new
            self._statistics[:, slots[:, None], columns] = table[1:, slots, first:]
            stops = np.isin(new, self._stop)
            ends = np.where(stops.any(1), stops.argmax(1) + 1, width + 1)  # beyond what there is: not yet
            finished = (ends <= width) | (start + width >= self._limit)
            self.position[slots] = np.minimum(start + np.minimum(ends, width), self._limit)
            counted += int((self.position[slots] - start).sum())
            answers += [self._release(slot) for slot in slots[finished].tolist()]
        return counted, answers

    def _release(self, slot: int) -> FinishedRow:
        row, length = int(self.row[slot]), int(self.position[slot])
        self.row[slot] = -1
        return FinishedRow(
            row,
            torch.from_numpy(self._tokens[slot, :length].copy()),
            torch.from_numpy(self._statistics[:, slot, :length].copy()),
        )

    def compact(self) -> tuple[list[int], list[int]]:
        """Move the rows of the last slots to free ones before them, so that they are slots 0 to ``busy - 1``.

        Returns:
            Slots moved from and to.
        """
        busy, active = self.busy, self.active
        sources = active[active >= busy]
        targets = np.flatnonzero(self.row[:busy] < 0)
        for values in (self.row, self.position, self._tokens):
            values[targets] = values[sources]
        self._statistics[:, targets] = self._statistics[:, sources]
        self.row[sources] = -1
        return sources.tolist(), targets.tolist()
