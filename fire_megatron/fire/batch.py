"""What the hooks read and what they return.

Shapes: B rows of this rank, R longest response.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from fire_megatron.metrics.values import Value


@dataclass(frozen=True)
class FireBatch:
    """Scores of this rank's trajectories. B may be 0. Padding (mask False) may hold anything on the way in;
    hooks see it as 0, and rows that cannot train as fully masked (see :func:`fire_megatron.fire.apply.apply_hooks`).
    """

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
        assert self.teacher_B.dtype == torch.int64

    def __len__(self) -> int:
        return len(self.teacher_B)

    def rows(self, part: slice) -> FireBatch:
        """A contiguous part of the rows."""
        tables = {k: v[part] for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **tables)

    def groups(self, group_by: str) -> tuple[torch.Tensor, tuple[str, ...]]:
        """[B] group index and the groups' names, for ``group_by`` of ``teacher`` or ``batch``."""
        if group_by == "teacher":
            return self.teacher_B, self.teacher_names
        assert group_by == "batch", group_by
        return torch.zeros_like(self.teacher_B), ("all",)


@dataclass(frozen=True)
class Selection:
    """Which trajectories train, and how much each token counts."""

    keep_B: torch.Tensor
    """[B] bool."""
    weight_BR: torch.Tensor
    """[B, R] float32, no gradient; meaningful on response tokens of kept rows."""
    reason: tuple[str | None, ...]
    """[B] why a row was dropped; None for kept rows."""
    metrics: dict[str, Value] = field(default_factory=dict)
    """What the hooks have to report, to be reduced over the same ranks as the rows."""
    details: dict[str, torch.Tensor] = field(default_factory=dict)
    """What the hooks decided by, for people who look at single rows: by name, [B] of rows or [B, R] of tokens."""

    def __post_init__(self) -> None:
        """Raises ValueError: shapes or types do not go together; hooks of the user's make selections too."""
        rows, tokens = self.keep_B.shape, self.weight_BR.shape
        if self.keep_B.dtype != torch.bool or rows != tokens[:1] or len(self.reason) != len(self.keep_B):
            raise ValueError(
                f"keep_B is {self.keep_B.dtype} of shape {tuple(rows)}, with {len(self.reason)} reasons and weights of "
                f"shape {tuple(tokens)}; it must be bool [rows], with a reason or None a row"
            )
        if self.weight_BR.dtype != torch.float32 or len(tokens) != 2:
            raise ValueError(f"weight_BR is {self.weight_BR.dtype} of shape {tuple(tokens)}; it must be float32 [B, R]")
        for name, table in self.details.items():
            if table.shape not in (rows, tokens):
                raise ValueError(f"detail {name!r} has shape {tuple(table.shape)}; it must be {rows} or {tokens}")
        for name, value in self.metrics.items():
            if not isinstance(value, Value):
                raise ValueError(f"metric {name!r} is {value!r}; give a Sum, Mean, Max, Min or Last")

    def drop(self, rows_B: torch.Tensor, reason: str) -> Selection:
        """Drop more rows ([B] bool); rows dropped before keep their first reason.

        Raises:
            ValueError: they are of another shape or type.
        """
        if rows_B.dtype != torch.bool or rows_B.shape != self.keep_B.shape:
            raise ValueError(f"rows to drop are {rows_B.dtype} {tuple(rows_B.shape)}; they must be bool, one a row")
        fresh = (rows_B & self.keep_B).tolist()
        reasons = tuple(reason if new else old for new, old in zip(fresh, self.reason, strict=True))
        return replace(self, keep_B=self.keep_B & ~rows_B, reason=reasons)

    def reweight(self, weight_BR: torch.Tensor) -> Selection:
        """The same rows with these weights ([B, R], any float dtype).

        Raises:
            ValueError: they have another shape.
        """
        if weight_BR.shape != self.weight_BR.shape:
            shapes = f"{tuple(weight_BR.shape)}, not {tuple(self.weight_BR.shape)}"
            raise ValueError(f"weights have shape {shapes}: one a token, [rows, longest response]")
        return replace(self, weight_BR=weight_BR.detach().float())

    def report(self, metrics: dict[str, Value], **details: torch.Tensor) -> Selection:
        """Add metrics, and details by name."""
        return replace(self, metrics=self.metrics | metrics, details=self.details | details)
