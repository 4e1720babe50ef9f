"""Text tables."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def aligned(rows: Sequence[Sequence[str]], *, left: Collection[int] | None = None) -> list[str]:
    """A line a row, its cells two spaces apart and as wide as their column.

    Args:
        rows: at least one, all of one length.
        left: columns that are aligned to the left, the others to the right; None is all of them.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust if left is None or i in left else str.rjust for i in range(len(widths))]
    return ["  ".join(side(*cell) for side, *cell in zip(sides, row, widths, strict=True)) for row in rows]


def ruled(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head, with a line below."""
    head, *lines = (line.rstrip() for line in aligned(rows))
    return "\n".join([head, "-" * len(head), *lines])
