"""Scores from samples: avg@k, pass@k, maj@k, and what they may be worth on other problems.

Shapes: P problems, n samples of each. Everything is float64 numpy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fire_megatron.metrics.table import ruled

RESAMPLES = 10_000
CONFIDENCE = 0.95
_SEED = 20_260_602


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Percentages."""
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def pass_at(correct_P: np.ndarray, n: int, k: int) -> np.ndarray:
    """Chance that at least one of k samples is right, for each problem.

    The unbiased estimate 1 - C(n - c, k) / C(n, k) from c right ones among n (Chen et al. 2021, arXiv 2107.03374,
    eq. 1), as a product, which does not overflow. At k = 1 it is the share that is right.

    Args:
        correct_P: [P] right samples of each problem.
        n: samples of each problem.
        k: 1 to n.

    Returns:
        [P] float64.
    """
    assert 1 <= k <= n
    wrong_P = n - np.asarray(correct_P, dtype=np.float64)
    missed = np.ones_like(wrong_P)
    for drawn in range(k):
        missed *= np.maximum(wrong_P - drawn, 0.0) / (n - drawn)
    return 1.0 - missed


def majority(classes: Sequence[int | None], correct: Sequence[bool]) -> float:
    """Chance that the answer given most often is right; of several given equally often each is as likely.

    Right answers vote together, wrong ones by class, those without an answer not at all.

    Args:
        classes: [n] the same number for answers that are equal, None without one.
        correct: [n] whether the sample is right.
    """
    wrong = Counter(name for name, right in zip(classes, correct, strict=True) if not right and name is not None)
    right, most = sum(correct), max(wrong.values(), default=0)
    if right < max(most, 1):
        return 0.0
    return 1.0 / (1 + sum(count == right for count in wrong.values()))


def bootstrap(values_P: Sequence[float] | np.ndarray) -> Estimate:
    """Mean over problems and its percentile interval (Efron 1979) over problems resampled from these.

    It estimates how far the score may be from that on other problems of the kind; samples are not resampled, but
    their spread is part of the spread of problems. The same values give the same interval, on every machine.
    """
    values = np.asarray(values_P, dtype=np.float64)
    problems = len(values)
    assert problems, "a mean of nothing"
    # Raw words of the counter-based generator are the same in every numpy.
    words = np.random.Philox(key=np.array([_SEED, problems], dtype=np.uint64))
    means = np.empty(RESAMPLES)
    rows = max(1, 1_000_000 // problems)
    for start in range(0, RESAMPLES, rows):
        size = min(rows, RESAMPLES - start)
        uniform = (words.random_raw(size * problems) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        means[start : start + size] = values[(uniform * problems).astype(np.int64)].reshape(size, problems).mean(1)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Estimate(float(values.mean()), float(low), float(high))


def powers_to(samples: int) -> list[int]:
    """1, 2, 4, ... and ``samples`` itself."""
    return sorted({*(2**i for i in range(samples.bit_length())), samples})


@dataclass(frozen=True)
class BenchmarkScores:
    """What a benchmark's samples come to."""

    problems: int
    samples: int
    average: Estimate
    """avg@n: share of the samples that are right, which also estimates pass@1."""
    passes: dict[int, Estimate]
    """pass@k by k."""
    vote: Estimate
    """maj@n."""
    mean_length: float
    """Tokens of an answer, its stop token included."""
    truncated: float
    """Share of the answers that were cut."""
    unanswered: float
    """Share of the answers without a box."""
    agrees_with_math_verify: float
    """Share of the answers on which math-verify has the same verdict; published scores are made with it."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON, by the names that papers use."""
        n = self.samples
        return {
            "problems": self.problems,
            "samples": n,
            f"avg@{n}": asdict(self.average),
            **{f"pass@{k}": asdict(estimate) for k, estimate in self.passes.items()},
            f"maj@{n}": asdict(self.vote),
            "mean_length": self.mean_length,
            "truncated": self.truncated,
            "unanswered": self.unanswered,
            "agrees_with_math_verify": self.agrees_with_math_verify,
        }

    def metrics(self) -> dict[str, float]:
        """The scores by these names, without their intervals."""
        values = {name: value["value"] if isinstance(value, dict) else value for name, value in self.as_dict().items()}
        return {name: value for name, value in values.items() if name not in ("problems", "samples")}


def score(
    correct_PN: np.ndarray,
    published_PN: np.ndarray,
    classes_PN: Sequence[Sequence[int | None]],
    lengths_PN: np.ndarray,
    truncated_PN: np.ndarray,
) -> BenchmarkScores:
    """Scores of a benchmark.

    Args:
        correct_PN: [P, n] whether each sample is right.
        published_PN: [P, n] whether math-verify calls it right.
        classes_PN: [P, n] the same number for equal answers of a problem, None without an answer.
        lengths_PN: [P, n] tokens.
        truncated_PN: [P, n] whether the answer was cut.
    """
    correct = np.asarray(correct_PN, dtype=bool)
    problems, n = correct.shape
    votes = [majority(classes, right) for classes, right in zip(classes_PN, correct.tolist(), strict=True)]
    return BenchmarkScores(
        problems=problems,
        samples=n,
        average=bootstrap(correct.mean(1)),
        passes={k: bootstrap(pass_at(correct.sum(1), n, k)) for k in powers_to(n)},
        vote=bootstrap(votes),
        mean_length=float(np.mean(lengths_PN)),
        truncated=float(np.mean(truncated_PN)),
        unanswered=float(np.mean([[name is None for name in classes] for classes in classes_PN])),
        agrees_with_math_verify=float(np.mean(correct == np.asarray(published_PN, dtype=bool))),
    )


def table(scores: dict[str, BenchmarkScores]) -> str:
    """Percentages with their intervals, a line a benchmark."""
    sizes = sorted({k for result in scores.values() for k in result.passes})
    most = max(result.samples for result in scores.values())
    heads = ["benchmark", "problems", "samples", f"avg@{most}", *(f"pass@{k}" for k in sizes if k > 1), f"maj@{most}"]
    rows = [[*heads, "tokens", "cut"]]
    for name, result in scores.items():
        estimates = [result.average, *(result.passes.get(k) for k in sizes if k > 1), result.vote]
        cells = ["-" if estimate is None else str(estimate) for estimate in estimates]
        counts = [name, str(result.problems), str(result.samples)]
        rows.append([*counts, *cells, f"{result.mean_length:.0f}", f"{100 * result.truncated:.0f}%"])
    return ruled(rows)
