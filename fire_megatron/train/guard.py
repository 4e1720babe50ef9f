"""Updates that are better not made: of a loss or a gradient that is not finite, or that has jumped."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from fire_megatron.config.schema import GuardConfig
from fire_megatron.metrics.values import Mean, Value
from fire_megatron.parallel.collectives import all_gather_stacked
from fire_megatron.platform.device import compute_device

NONFINITE, SPIKE = "nonfinite", "spike"
_ENOUGH = 16
"""Updates that must have been seen before one can be out of the ordinary."""
_SIGMA = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation (Rousseeuw & Croux 1993)."""


class UpdateGuard:
    """Judges each update by its loss and the norm of its gradient, before it is made.

    Every rank judges alike, from the same numbers. What it remembers is saved with the run, so that a resumed run
    judges as an uninterrupted one.
    """

    def __init__(self, config: GuardConfig) -> None:
        """Args: config: when to skip, and how often."""
        self._config = config
        self._seen = {name: deque[float](maxlen=config.spike_window) for name in ("loss", "grad_norm")}
        self.in_a_row = 0
        """Updates skipped since the last one made."""
        self.ruined = False
        """Whether the last update was skipped for a number that is not finite: the weights themselves may be."""
        self.total = 0
        """Updates skipped in the whole run."""
        self.exhausted: tuple[int, str] | None = None
        """Once more updates in a row have been skipped than may be: how many, and why the last of them was. It stays,
        whatever a later update of the same step."""
        self._now = {NONFINITE: 0, SPIKE: 0}

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """Why not to make an update, or None. Counts it.

        Args:
            loss: mean over the tokens of the update, over all ranks.
            grad_norm: of the whole gradient, before clipping.
        """
        numbers = {"loss": loss, "grad_norm": grad_norm}
        reason = None
        if not all(map(math.isfinite, numbers.values())):
            reason = NONFINITE
        elif self._config.spike_factor and any(self._jumps(name, value) for name, value in numbers.items()):
            reason = SPIKE
        if reason is not None:
            self.skip(reason)
            return reason
        for name, value in numbers.items():
            self._seen[name].append(value)
        self.in_a_row, self.ruined = 0, False
        return None

    def _jumps(self, name: str, value: float) -> bool:
        seen = self._seen[name]
        if len(seen) < min(_ENOUGH, self._config.spike_window):
            return False
        middle = statistics.median(seen)
        spread = _SIGMA * statistics.median(abs(x - middle) for x in seen)
        # Where all are nearly equal, rounding is no jump.
        return value - middle > self._config.spike_factor * max(spread, 1e-3 * abs(middle), 1e-12)

    def skip(self, reason: str) -> None:
        """Count an update that is not made."""
        self.in_a_row, self.total, self.ruined = self.in_a_row + 1, self.total + 1, reason == NONFINITE
        self._now[reason] += 1
        if self.in_a_row > self._config.max_skipped:
            self.exhausted = self.in_a_row, reason

    def metrics(self) -> dict[str, float]:
        """Updates skipped since the last call, in a row and in all; alike on every rank."""
        now, self._now = self._now, {NONFINITE: 0, SPIKE: 0}
        return {
            **{f"skipped/{reason}": float(count) for reason, count in now.items()},
            "skipped/in_a_row": float(self.in_a_row),
            "skipped/total": float(self.total),
        }

    def state(self) -> dict[str, Any]:
        """What to save; nothing is while :attr:`ruined`."""
        seen: Mapping[str, Sequence[float]] = {name: list(values) for name, values in self._seen.items()}
        return {"seen": seen, "in_a_row": self.in_a_row, "total": self.total}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what was saved; with nothing saved, from the start."""
        for name, values in state.get("seen", {}).items():
            self._seen[name] = deque(values, maxlen=self._config.spike_window)
        self.in_a_row, self.total = state.get("in_a_row", 0), state.get("total", 0)


def agreed(report: Mapping[str, Value], grad_norm: float, *, group: dist.ProcessGroup) -> tuple[float, float]:
    """Loss and gradient norm of an update, the same on every rank to the last bit. Collective: one gather of three
    numbers.

    Args:
        report: this rank's part of the metrics of the update, whose tokens are spread over ranks; those that report
            nothing have no ``loss``.
        grad_norm: as this rank has it; replicas that each reduce it themselves may differ in the last bit.
        group: all ranks of the student.
    """
    part = report.get("loss", Mean(0.0, 0.0))
    assert isinstance(part, Mean)
    mine = torch.tensor([part.total, part.count, grad_norm], dtype=torch.float64, device=compute_device())
    total, count, norms = all_gather_stacked(mine, group=group).T
    loss = float(total.sum() / count.sum()) if float(count.sum()) else 0.0
    return loss, float(norms.max())  # not-a-number, if any is


def skips(guard: UpdateGuard, report: Mapping[str, Value], grad_norm: float, *, group: dist.ProcessGroup) -> bool:
    """Whether to skip the update that these are of, the same on every rank; see :func:`agreed`."""
    return guard.judge(*agreed(report, grad_norm, group=group)) is not None
