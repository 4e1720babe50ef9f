"""Whether a prompt holds a problem of a benchmark: the same text, or most of its words in the same runs.

GPT-3 (arXiv 2005.14165, appendix C) calls a text contaminated that shares one run of 8 to 13 words with a benchmark,
signs, spaces and case left out. Problems of mathematics share such runs by nature ("where m and n are relatively prime
positive integers"), so here the shared runs have to make up most of the benchmark's problem.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fire_megatron.config.errors import DataError
from fire_megatron.data.rows import row_messages
from fire_megatron.prepare.row_keys import KeyChoice, open_rows
from fire_megatron.prepare.same_text import plain, words

RUN = 8
"""Words of a run; a problem of fewer words is compared whole. The smallest n of GPT-3's."""
OVERLAP = 0.7
"""A problem is found when at least this share of its words is in shared runs; docs/data.md has the evidence."""
_COMMON_SHARE, _COMMON_LEAST = 0.1, 10
"""A run in at least this share of a benchmark's problems, and this many, is an instruction, not a problem."""


@dataclass(frozen=True)
class Contamination:
    """A benchmark's problem that a prompt holds."""

    benchmark: int
    """Index of the file."""
    where: str
    """File and line of the problem."""
    share: float
    """Share of the problem's words that the prompt has in runs; 1 also for the same text."""

    def __str__(self) -> str:
        how = "all" if self.share == 1 else f"{self.share:.0%}"
        return f"{how} of the problem at {self.where}"


@dataclass(frozen=True)
class _Problem:
    benchmark: int
    where: str
    words: int


class BenchmarkProblems:
    """The problems that training must not see."""

    def __init__(self, paths: Sequence[Path], *, key: str | None = None, overlap: float = OVERLAP) -> None:
        """Read the files.

        Args:
            paths: files of problems, in any format of prompts; labels are not needed.
            key: dotted key of the problem; None finds it.
            overlap: see :data:`OVERLAP`; above 0, at most 1.

        Raises:
            DataError: a file that cannot be read, or a row without a problem: what cannot be read cannot be kept out.
        """
        self.paths = tuple(paths)
        self.overlap = overlap
        self._problems: list[_Problem] = []
        self._whole: dict[str, int] = {}
        self._runs: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for number, path in enumerate(self.paths):
            self._add(number, path, key)

    def __len__(self) -> int:
        """Problems of all files."""
        return len(self._problems)

    def count(self, benchmark: int) -> int:
        """Problems of a file."""
        return sum(problem.benchmark == benchmark for problem in self._problems)

    def _add(self, number: int, path: Path, key: str | None) -> None:
        texts = list(_problems(path, key))
        if not texts:
            raise DataError(f"{path}: no problem in this benchmark; correct the path, or leave it out")
        listed = [words(text) for _, text in texts]
        common = _common_runs(listed)
        for (where, text), every in zip(texts, listed, strict=True):
            own = _without(every, common) if common else every
            index = len(self._problems)
            self._problems.append(_Problem(number, where, len(own)))
            self._whole.setdefault(text, index)
            for start, run in enumerate(_runs(own)):
                self._runs[run].append((index, start))

    def find(self, texts: Sequence[str]) -> Contamination | None:
        """The problem that a chat holds most of, at least ``overlap`` of it; None where there is none.

        Args:
            texts: its messages, :func:`plain`; any of them may be the problem, or hold parts of it.
        """
        if not self._problems:
            return None
        for text in texts:
            if text and text in self._whole:
                return self._match(self._whole[text], 1.0)
        found: dict[int, set[int]] = defaultdict(set)
        for text in texts:
            for run in _runs(words(text)):
                for index, start in self._runs.get(run, ()):
                    found[index].update(range(start, start + RUN))
        shares = {index: len(places) / self._problems[index].words for index, places in found.items()}
        best = max(shares, key=shares.__getitem__, default=None)
        return None if best is None or shares[best] < self.overlap else self._match(best, shares[best])

    def _match(self, index: int, share: float) -> Contamination:
        problem = self._problems[index]
        return Contamination(problem.benchmark, problem.where, share)


def _problems(path: Path, key: str | None) -> Iterator[tuple[str, str]]:
    """Place and plain text of each problem; of a chat its messages from the user."""
    keys = KeyChoice(prompt=key, wants_label=False, prompt_option="--benchmark-key").of(path)
    for where, row in open_rows(path, keys.prompt):
        try:
            if isinstance(row, DataError):
                raise row
            messages = row_messages(row, keys.prompt)
        except DataError as error:
            raise DataError(f"{where}: a benchmark's problem cannot be read: {error}") from error
        yield where, plain("\n".join(m["content"] for m in messages if m["role"] == "user"))


def _runs(listed: Sequence[str]) -> Iterator[str]:
    return (" ".join(listed[i : i + RUN]) for i in range(len(listed) - RUN + 1))


def _common_runs(problems: Sequence[Sequence[str]]) -> set[str]:
    """Runs that so many problems of a benchmark share that they are an instruction."""
    counts = Counter(run for problem in problems for run in set(_runs(problem)))
    least = max(_COMMON_LEAST, _COMMON_SHARE * len(problems))
    return {run for run, count in counts.items() if count >= least}


def _without(listed: Sequence[str], common: set[str]) -> list[str]:
    """The words that are in no common run."""
    gone = {i + j for i, run in enumerate(_runs(listed)) if run in common for j in range(RUN)}
    return [word for i, word in enumerate(listed) if i not in gone]
