"""Steps from which nothing is learned: of a teacher's rows, or of all rows, none has trained."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

_CHANCE = 8
"""Rows that hooks must have dropped before their teacher counts as left out: a step may have one of a rare label."""


@dataclass
class _Drought:
    """Steps in a row that have had rows of a teacher, or of any, none of which has trained."""

    steps: int = 0
    rows: float = 0
    nonfinite: float = 0
    """Those of ``rows`` whose scores by the teacher are not finite."""
    ever: bool = False
    """Whether any row has trained before."""

    def add(self, rows: float, nonfinite: float, *, trained: bool) -> None:
        """A step with ``rows`` of them."""
        if trained:
            self.steps, self.rows, self.nonfinite, self.ever = 0, 0, 0, True
        elif rows:
            self.steps, self.rows, self.nonfinite = self.steps + 1, self.rows + rows, self.nonfinite + nonfinite

    @property
    def scored_in_vain(self) -> bool:
        """Whether it is for the teacher's scores that none has trained; some rows may be empty, or dropped by hooks."""
        return self.nonfinite > self.rows / 2


def unsound_rows(metrics: Mapping[str, float]) -> dict[str, float]:
    """Rows of a step whose scores are not finite, by teacher."""
    keys = {key.split("/")[1]: key for key in metrics if key.startswith("teacher/") and key.endswith("/nonfinite")}
    return {name: metrics[key] for name, key in keys.items()}


class Fruitless:
    """Counts steps that have trained nothing. Every rank counts alike, from the same metrics."""

    def __init__(self, most: int) -> None:
        """Args: most: such steps in a row that may be (``optimizer.guard.max_skipped``)."""
        self._most = most
        self._all, self._teachers = _Drought(), defaultdict[str, _Drought](_Drought)
        self._reasons = ""
        self._told: set[str] = set()

    def step(self, metrics: Mapping[str, float]) -> Iterator[str]:
        """Count a step, given its reduced metrics. Yields what people should know of teachers whose scores are not
        finite, once a teacher."""
        dropped = [(key.rpartition("/")[2], n) for key, n in metrics.items() if key.startswith("fire/dropped/") and n]
        self._reasons = ", ".join(f"{reason} {n:.0f}" for reason, n in dropped) or "none, but all weights are 0"
        nonfinite = unsound_rows(metrics)
        rows = {name: metrics[f"teacher/{name}/rows"] for name in nonfinite}
        weighs = metrics.get("fire/token_weight_max", 0) != 0 or metrics.get("fire/token_weight_min", 0) != 0
        self._all.add(sum(rows.values()), sum(nonfinite.values()), trained=weighs)
        for name in rows:
            trained = weighs and metrics.get(f"teacher/{name}/keep_ratio", 0) > 0
            self._teachers[name].add(rows[name], nonfinite[name], trained=trained)
            if nonfinite[name] and name not in self._told:
                self._told.add(name)
                share = f"{nonfinite[name]:.0f} of {rows[name]:.0f} rows"
                yield (
                    f"WARNING: {_role(name)}: log-probabilities or entropies of {share} are not finite; such rows are "
                    "dropped"
                )

    def problem(self, *, ended: bool = False) -> str | None:
        """Why the run should not go on, or, once it has ``ended``, why it was in vain; None where it may."""
        most, together = self._most, self._too_long(self._all, ended)
        found = {name: drought for name, drought in self._teachers.items() if self._too_long(drought, ended)}
        suspects = self._teachers if together and self._all.scored_in_vain else found
        broken = {name: drought for name, drought in suspects.items() if drought.scored_in_vain}
        if broken:
            roles, steps = (
                " and ".join(map(_role, broken)),
                max(self._all.steps, *(drought.steps for drought in broken.values())),
            )
            return (
                f"{roles}: none of its rows trained in {_steps(steps, most)}, since log-probabilities or entropies "
                "were not finite, so the run stops; correct the teacher's checkpoint, or its precision.dtype if its "
                "values do not fit"
            )
        if together:
            return (
                f"no row trained in {_steps(self._all.steps, most)} (dropped in the last: {self._reasons}), so the "
                "run stops; change loss.hooks, or what makes them drop every row"
            )
        for name, drought in () if ended else found.items():
            if drought.rows >= _CHANCE:
                return (
                    f"{_role(name)}: none of its {drought.rows:.0f} rows trained in {_steps(drought.steps, most)} "
                    f"(dropped in the last, of all teachers: {self._reasons}), so the run stops; change loss.hooks, or "
                    "leave the teacher out"
                )
        return None

    def _too_long(self, drought: _Drought, ended: bool) -> bool:
        return drought.steps > self._most or (ended and drought.steps > 0 and not drought.ever)

    def state(self) -> dict[str, Any]:
        """What to save."""
        return {"all": asdict(self._all), "teachers": {name: asdict(d) for name, d in self._teachers.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what was saved; with nothing saved, from the start."""
        self._all = _Drought(**state.get("all", {}))
        self._teachers.update({name: _Drought(**values) for name, values in state.get("teachers", {}).items()})


def _steps(count: int, most: int) -> str:
    return f"{count} step{'s' if count > 1 else ''} in a row (optimizer.guard.max_skipped={most})"


def _role(target: str) -> str:
    """``teachers.math``; of a mixture (:attr:`Target.name`) ``teachers.code and teachers.math``."""
    return " and ".join(f"teachers.{name}" for name in target.split("+"))
