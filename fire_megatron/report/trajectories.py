"""Sampled trajectories as the page shows them."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TEXT, GAP = "text", "log_prob_gap"
_INDEX = (
    "step", "row", "label", "teacher", "kept", "reason", "mean_log_prob", "threshold", "reverse_kl", "tokens",
    "truncated",
)  # fmt: skip
_TITLES = {
    "weight": "weight",
    "confidence": "teacher's confidence",
    "confusion": "student's confusion",
    GAP: "teacher − student log-prob",
    "teacher_log_prob": "teacher's log-prob",
    "student_log_prob": "student's log-prob",
}
_BOUNDS = {"confidence": (0.0, 1.0), "confusion": (0.0, 1.0)}
_OUTER = 0.02
"""Share of the tokens at either end that get the same shade, so that a few extremes do not pale the others."""
_LOOKED_AT, _TOKENS_LOOKED_AT = 300, 1000


@dataclass(frozen=True)
class Quantity:
    """Something that tokens are shaded by."""

    key: str
    title: str
    low: float
    high: float
    """Values of the lightest and the darkest shade, the same for all trajectories."""
    signed: bool
    """Whether 0 is in the middle, with a colour to either side."""


def index_line(run: int, sample: Mapping[str, Any]) -> dict[str, Any]:
    """What the page knows of a trajectory before it is opened."""
    return {"run": run, **{key: sample.get(key) for key in _INDEX}}


def body(sample: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of an open trajectory: prompt, response, and columns by token, of equal lengths.

    Lines of a version without numbers by token have the response as a single text.
    """
    given = sample.get("by_token")
    columns = {str(key): values for key, values in given.items()} if isinstance(given, Mapping) else {}
    texts = columns.pop(TEXT, None)
    if not isinstance(texts, list) or "".join(map(str, texts)) != sample.get("response"):
        texts, columns = [str(sample.get("response", ""))], {}
    numbers = {key: values for key, values in columns.items() if isinstance(values, list) and len(values) == len(texts)}
    if {"teacher_log_prob", "student_log_prob"} <= set(numbers):
        numbers[GAP] = [
            None if teacher is None or student is None else round(teacher - student, 4)
            for teacher, student in zip(numbers["teacher_log_prob"], numbers["student_log_prob"], strict=True)
        ]
    return {"prompt": str(sample.get("prompt", "")), "texts": [str(text) for text in texts], "numbers": numbers}


class Shades:
    """Sees the trajectories one by one and holds some of their numbers, of which it makes the bounds of the shades."""

    def __init__(self, trajectories: int) -> None:
        """Args: trajectories: how many there will be; of many, only some are examined."""
        self._every, self._seen = _stride(trajectories, _LOOKED_AT), 0
        self._values: dict[str, array[float]] = {}

    def see(self, body: Mapping[str, Any]) -> None:
        """Look at the next one; of one with many tokens, at some."""
        self._seen += 1
        if (self._seen - 1) % self._every:
            return
        for key, column in body["numbers"].items():
            some = column[:: _stride(len(column), _TOKENS_LOOKED_AT)]
            kept = self._values.setdefault(key, array("d"))
            kept.extend(float(v) for v in some if type(v) in (int, float) and math.isfinite(v))

    def quantities(self) -> list[Quantity]:
        """What the tokens have, FiRe's first."""
        values = self._values
        order = [*(key for key in _TITLES if key in values), *(key for key in values if key not in _TITLES)]
        return [_quantity(key, sorted(values[key])) for key in order if values[key]]


def _stride(count: int, most: int) -> int:
    return max(-(-count // most), 1)


def _quantity(key: str, values: Sequence[float]) -> Quantity:
    outer = int(len(values) * _OUTER)
    low, high = _BOUNDS.get(key, (values[outer], values[-1 - outer]))
    signed = low < 0 < high
    if signed:
        high = max(-low, high)
        low = -high
    if low == high:
        low, high = low - 1, high + 1
    return Quantity(key, _TITLES.get(key, key.replace("_", " ")), low, high, signed)
