"""What became of the rows that were prepared: counts, lengths and rejects, for people and as JSON."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fire_megatron.data.rows import Reason
from fire_megatron.metrics.table import aligned
from fire_megatron.prepare.contamination import BenchmarkProblems, Contamination

PERCENTILES = (50, 90, 99, 100)
_LABELS = 20
"""Labels, and pairs of labels, in the table; the JSON has all."""


@dataclass
class SourceReport:
    """One file that was read."""

    path: str
    keys: dict[str, str]
    """Which keys its rows were read by: of ``prompt``, ``label`` and ``answer``."""
    rows: int = 0
    kept: int = 0


@dataclass(frozen=True)
class LabelReport:
    """The rows kept of a label."""

    rows: int
    lengths: dict[str, int]
    """By percentile, as ``p50``."""


@dataclass(frozen=True)
class RejectReport:
    """The rows rejected for a reason."""

    rows: int
    first: str
    """Place of the first, and what is wrong with it."""


@dataclass(frozen=True)
class BenchmarkReport:
    """What was found of a benchmark."""

    path: str
    problems: int
    problems_found: int
    """Different problems that a row was refused for."""
    rows_refused: int
    rows_in_full: int
    """Of these, rows with the whole problem; the others have most of its words."""


@dataclass(frozen=True)
class PrepareReport:
    """See the module."""

    out: str
    rows: int
    kept: int
    length_unit: str
    """``tokens`` or ``characters``."""
    sources: list[SourceReport]
    all_labels: LabelReport | None
    """All rows kept; None where there is none."""
    labels: dict[str, LabelReport]
    """By label, labels of a mixture joined by ``+``."""
    rejects: dict[str, RejectReport]
    """By reason."""
    other_labels: dict[str, int]
    """Duplicates with another label, by ``kept / rejected``."""
    benchmarks: list[BenchmarkReport] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The same as JSON's types."""
        return asdict(self)

    def __str__(self) -> str:
        files = [(s.path, s.rows, s.kept, "  ".join(f"{k}={key}" for k, key in s.keys.items())) for s in self.sources]
        found = [(b.path, b.problems, b.problems_found, b.rows_refused, b.rows_in_full) for b in self.benchmarks]
        tables = [
            (("file", "rows", "kept", "keys"), files, (0, 3)),
            (*self._label_table(), (0,)),
            (("rejected", "rows", "the first"), [(why, r.rows, r.first) for why, r in self.rejects.items()], (0, 2)),
            (("duplicates: label kept / rejected", "rows"), list(self.other_labels.items())[:_LABELS], (0,)),
            (("benchmark", "problems", "found", "rows refused", "in full"), found, (0,)),
        ]
        told = ["\n".join(aligned([head, *rows], left=left)) for head, rows, left in tables if rows]
        counts = f"{self.rows} rows read, {self.kept} kept, {self.rows - self.kept} rejected"
        return "\n\n".join([counts, *told])

    def _label_table(self) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
        """Head and rows; no rows where none is kept."""
        total, named = self.all_labels, list(self.labels.items())
        if total is None:
            return (), []
        rows = [(label, r.rows, *r.lengths.values()) for label, r in named[:_LABELS]]
        if len(named) > _LABELS:
            rest = sum(r.rows for _, r in named[_LABELS:])
            rows.append((f"... {len(named) - _LABELS} more", rest, *[""] * len(PERCENTILES)))
        percentiles = (f"{self.length_unit}: {name}" if name == "p50" else name for name in total.lengths)
        return ("label", "rows", *percentiles), [*rows, ("all", total.rows, *total.lengths.values())]


class Tally:
    """Counts while rows are read. Memory: four bytes a row kept."""

    def __init__(self) -> None:
        self.sources: list[SourceReport] = []
        self._lengths: dict[str, array] = defaultdict(lambda: array("I"))
        self._rejects: Counter[Reason] = Counter()
        self._first: dict[Reason, str] = {}
        self._other_labels: Counter[str] = Counter()
        self._matches: dict[int, Counter[str]] = defaultdict(Counter)
        self._in_full: Counter[int] = Counter()

    def keep(self, label: str, length: int) -> None:
        """Count a row kept, with its length in tokens or characters."""
        self.sources[-1].kept += 1
        self._lengths[label].append(length)

    def reject(self, reason: Reason, where: str, detail: str) -> None:
        """Count a row rejected."""
        self._rejects[reason] += 1
        if reason not in self._first:
            self._first[reason] = f"{where}: {detail}"

    def other_label(self, kept: str, rejected: str) -> None:
        """Count a duplicate with another label."""
        self._other_labels[f"{kept} / {rejected}"] += 1

    def contaminated(self, match: Contamination) -> None:
        """Count a row that holds a benchmark's problem."""
        self._matches[match.benchmark][match.where] += 1
        self._in_full[match.benchmark] += match.share == 1

    @property
    def kept(self) -> int:
        """Rows kept so far."""
        return sum(map(len, self._lengths.values()))

    def report(self, out: str, length_unit: str, benchmarks: BenchmarkProblems) -> PrepareReport:
        """What was counted."""
        return PrepareReport(
            out=out,
            rows=sum(source.rows for source in self.sources),
            kept=self.kept,
            length_unit=length_unit,
            sources=self.sources,
            all_labels=_lengths(*self._lengths.values()) if self._lengths else None,
            labels={label: _lengths(lengths) for label, lengths in sorted(self._lengths.items())},
            rejects={r: RejectReport(self._rejects[r], self._first[r]) for r in Reason if r in self._rejects},
            other_labels=dict(self._other_labels.most_common()),
            benchmarks=[
                BenchmarkReport(
                    path=str(path),
                    problems=benchmarks.count(number),
                    problems_found=len(self._matches[number]),
                    rows_refused=sum(self._matches[number].values()),
                    rows_in_full=self._in_full[number],
                )
                for number, path in enumerate(benchmarks.paths)
            ],
        )


def _lengths(*lengths: array) -> LabelReport:
    values = np.concatenate([np.frombuffer(part, dtype=np.uint32) for part in lengths])
    found = np.percentile(values, PERCENTILES, method="higher")
    return LabelReport(len(values), {f"p{p}": int(n) for p, n in zip(PERCENTILES, found, strict=True)})
