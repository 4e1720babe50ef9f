"""Sampled trajectories as the page shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fire_megatron.report.read import RunData

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
_LOOKED_AT = 300


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


def quantities(bodies: Sequence[Mapping[str, Any]]) -> list[Quantity]:
    """What the tokens of these trajectories have, FiRe's first, with the bounds of the shades (of many trajectories,
    some are looked at)."""
    values: dict[str, list[float]] = {}
    for one in bodies[:: max(len(bodies) // _LOOKED_AT, 1)]:
        for key, column in one["numbers"].items():
            values.setdefault(key, []).extend(v for v in column if type(v) in (int, float) and math.isfinite(v))
    order = [*(key for key in _TITLES if key in values), *(key for key in values if key not in _TITLES)]
    return [_quantity(key, sorted(values[key])) for key in order if values[key]]


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


def runs_bodies(runs: Sequence[RunData]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Index lines and bodies of all runs' trajectories, in step."""
    index, bodies = [], []
    for number, run in enumerate(runs):
        for sample in run.samples:
            index.append(index_line(number, sample))
            bodies.append(body(sample))
    return index, bodies
