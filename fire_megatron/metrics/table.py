"""Text tables."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def aligned(rows: Sequence[Sequence[object]], *, left: Collection[int] = (0,), indent: str = "") -> list[str]:
    """A line a row, its cells two spaces apart and as wide as their column.

    Args:
        rows: at least one, all of one length.
        left: columns that are aligned to the left, the others to the right.
        indent: what each line begins with.
    """
    texts = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    sides = [str.ljust if i in left else str.rjust for i in range(len(widths))]
    lines = ("  ".join(side(*cell) for side, *cell in zip(sides, row, widths, strict=True)) for row in texts)
    return [f"{indent}{line}".rstrip() for line in lines]


def ruled(rows: Sequence[Sequence[str]]) -> str:
    """A table to the left, whose first row is its head, with a line below."""
    head, *lines = aligned(rows, left=range(len(rows[0])))
    return "\n".join([head, "-" * len(head), *lines])
