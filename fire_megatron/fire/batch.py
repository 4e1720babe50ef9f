"""What the hooks read and what they return.

Shapes: B rows of this rank, R longest response.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from fire_megatron.metrics.values import Value


class Reducer(Protocol):
    """Reductions over the ranks that hold the other rows (:class:`fire_megatron.parallel.reducer.Reducer`)."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise sum over the ranks."""
        ...

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise maximum over the ranks."""
        ...

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """[n] a rank -> concatenation in rank order."""
        ...


@dataclass(frozen=True)
class FireBatch:
    """Scores of this rank's trajectories. B may be 0."""

    teacher_B: torch.Tensor
    """[B] int64 index into ``teacher_names``."""
    teacher_names: tuple[str, ...]
    """All teachers of the run, the same on every rank."""
    mask_BR: torch.Tensor
    """[B, R] bool, response tokens."""
    teacher_logp_BR: torch.Tensor
    """[B, R] float32, the teacher's log-probability of each token."""
    teacher_entropy_BR: torch.Tensor
    """[B, R] float32, nats."""
    student_entropy_BR: torch.Tensor
    """[B, R] float32, nats."""
    truncated_B: torch.Tensor
    """[B] bool, the response ran into the length limit."""

    def __post_init__(self) -> None:
        rows, width = self.mask_BR.shape
        for name in ("teacher_logp_BR", "teacher_entropy_BR", "student_entropy_BR"):
            assert getattr(self, name).shape == (rows, width), name
        assert self.teacher_B.shape == self.truncated_B.shape == (rows,)
        assert self.mask_BR.dtype == self.truncated_B.dtype == torch.bool

    def rows(self, part: slice) -> FireBatch:
        """A contiguous part of the rows."""
        tables = {k: v[part] for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **tables)

    def groups(self, group_by: str) -> tuple[torch.Tensor, tuple[str, ...]]:
        """[B] group index and the groups' names, for ``group_by`` of ``teacher`` or ``batch``."""
        if group_by == "teacher":
            return self.teacher_B, self.teacher_names
        return torch.zeros_like(self.teacher_B), ("all",)


@dataclass(frozen=True)
class Selection:
    """Which trajectories train, and how much each token counts."""

    keep_B: torch.Tensor
    """[B] bool."""
    weight_BR: torch.Tensor
    """[B, R] float32, no gradient; meaningful where ``keep_B`` and the mask are set."""
    reasons: tuple[str | None, ...]
    """[B] why a row was dropped; None for kept rows."""
    metrics: dict[str, Value] = field(default_factory=dict)
    """What the hooks have to report, to be reduced over the same ranks as the rows."""

    def drop(self, rows_B: torch.Tensor, reason: str) -> Selection:
        """Drop more rows ([B] bool); rows dropped before keep their first reason."""
        fresh = (rows_B & self.keep_B).tolist()
        reasons = tuple(reason if new else old for new, old in zip(fresh, self.reasons, strict=True))
        return replace(self, keep_B=self.keep_B & ~rows_B, reasons=reasons)

    def report(self, metrics: dict[str, Value]) -> Selection:
        """Add metrics."""
        return replace(self, metrics=self.metrics | metrics)
