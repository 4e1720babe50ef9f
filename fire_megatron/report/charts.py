"""Which curves a report shows: a table of charts by metric key; what no chart names has one of its own at the end."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fire_megatron.report.read import RunData

_DIGITS = 5
"""Significant digits of a point."""


@dataclass(frozen=True)
class Chart:
    """One chart of the page."""

    section: str
    title: str
    unit: str
    keys: tuple[str, ...]
    """Metric keys, each a curve; a ``*`` stands for a name, of which each is a curve."""
    labels: tuple[str, ...] = ()
    """Of the keys without ``*``; their last parts where not given."""
    bars: bool = False
    """Whether values are counts that add up."""
    quiet: bool = False
    """Whether a line of text says enough while all curves stay at one value."""

    def match(self, key: str) -> str | None:
        """The curve's label, where the key is this chart's."""
        for number, pattern in enumerate(self.keys):
            found = _pattern(pattern).fullmatch(key)
            if found:
                own = self.labels[number] if number < len(self.labels) else key.rpartition("/")[2].replace("_", " ")
                return found[1] if found.groups() else own
        return None


def _pattern(key: str) -> re.Pattern[str]:
    return re.compile("([^/]+)".join(map(re.escape, key.split("*"))))


_LOSS, _TEACHERS, _FIRE, _ROLLOUT = "Loss", "Teachers", "Filter and reweight", "Rollouts"
_EVALUATION, _TIME, _MACHINE, _OTHER = "Evaluation", "Time", "Memory and GPUs", "Other"
SECTIONS = (_LOSS, _TEACHERS, _FIRE, _ROLLOUT, _EVALUATION, _TIME, _MACHINE, _OTHER)

CHARTS = (
    Chart(_LOSS, "Loss", "per response token", ("loss",)),
    Chart(_LOSS, "Divergence, without weights", "nats a token", ("loss/divergence", "teacher/*/divergence"), ("all",)),
    Chart(_LOSS, "Gradient norm, before clipping", "", ("grad_norm",)),
    Chart(_LOSS, "Learning rate", "", ("learning_rate",)),
    Chart(_LOSS, "Clipped tokens", "fraction", ("loss/clip_fraction",), quiet=True),
    Chart(_LOSS, "Old minus new log-prob", "nats a token", ("loss/approx_kl",), quiet=True),
    Chart(_LOSS, "Updates skipped in the step", "updates", ("skipped/nonfinite", "skipped/spike"), quiet=True),
    Chart(_LOSS, "Updates skipped so far", "updates", ("skipped/in_a_row", "skipped/total"), quiet=True),
    Chart(_LOSS, "Fullest expert over an even share", "1 = balance", ("moe/max_load",)),
    Chart(_LOSS, "Routers' auxiliary losses", "", ("moe/aux_loss", "moe/z_loss")),
    Chart(_TEACHERS, "Reverse KL of the samples", "nats a token", ("teacher/*/reverse_kl",)),
    Chart(_TEACHERS, "Keep rate", "fraction of rows", ("teacher/*/keep_ratio", "fire/keep_ratio"), ("", "all")),
    Chart(_TEACHERS, "Teacher's log-prob of the samples", "nats a token", ("teacher/*/log_prob",)),
    Chart(_TEACHERS, "Filter's threshold", "mean log-prob, nats", ("fire/threshold/*",)),
    Chart(_TEACHERS, "Rows", "rows a step", ("teacher/*/rows",)),
    Chart(_TEACHERS, "Rows whose scores are not finite", "rows a step", ("teacher/*/nonfinite",), quiet=True),
    Chart(_FIRE, "Dropped rows by reason", "rows a step", ("fire/dropped/*",), bars=True),
    Chart(_FIRE, "Confidence and confusion", "mean over tokens", ("fire/confidence", "fire/confusion"),
          ("teacher's confidence", "student's confusion")),
    Chart(_FIRE, "Token weights", "mean is 1",
          ("fire/token_weight_max", "fire/token_weight_mean", "fire/token_weight_min"), ("max", "mean", "min")),
    Chart(_ROLLOUT, "Length", "response tokens a row", ("rollout/mean_length",)),
    Chart(_ROLLOUT, "Truncated rows", "fraction", ("rollout/truncated",)),
    Chart(_ROLLOUT, "Student's entropy", "nats a token", ("rollout/entropy",)),
    Chart(_ROLLOUT, "Tokens sampled", "tokens a step", ("rollout/tokens",)),
    Chart(_ROLLOUT, "Importance, trainer over engine", "ratio", ("rollout/importance_mean",), quiet=True),
    Chart(_ROLLOUT, "Tokens cut by importance", "fraction", ("rollout/importance_cut",), quiet=True),
    Chart(_TIME, "Step by phase", "seconds",
          ("time/step", "time/rollout", "time/rollout_wait", "time/teacher_exposed", "time/update"),
          ("step", "rollout", "waiting for the slowest replica", "teachers, not hidden", "update")),
    Chart(_TIME, "Teachers' scoring", "seconds", ("time/teacher/*",)),
    Chart(_TIME, "Sampling speed", "tokens a second", ("rollout/tokens_per_second",)),
    Chart(_TIME, "Between student and teachers", "bytes a step", ("router/bytes",)),
    Chart(_TIME, "Sent by a teacher", "bytes a token", ("teacher/*/bytes_per_token",), quiet=True),
    Chart(_TIME, "What its logits would take", "bytes a token", ("teacher/*/bytes_per_token_of_logits",), quiet=True),
    Chart(_MACHINE, "Memory of the fullest rank", "MiB",
          ("memory/peak_mb", "gpu/memory_used_mb"), ("torch or process", "GPU, all processes")),
    Chart(_MACHINE, "GPU utilization", "%", ("gpu/utilization", "gpu/memory_bandwidth_utilization"),
          ("kernels", "memory")),
    Chart(_MACHINE, "Power of a GPU", "W", ("gpu/power_w",)),
    Chart(_MACHINE, "Energy of all GPUs", "J a step", ("gpu/energy_j",)),
    Chart(_MACHINE, "Hottest GPU", "°C", ("gpu/temperature_c",)),
    Chart(_MACHINE, "Clock of the multiprocessors", "MHz", ("gpu/sm_clock_mhz",)),
    Chart(_MACHINE, "Clocks held down", "share of samples",
          ("gpu/throttled", "gpu/throttled/power", "gpu/throttled/thermal"), ("any cause",), quiet=True),
    Chart(_MACHINE, "ECC errors", "errors a step", ("gpu/ecc_corrected", "gpu/ecc_uncorrected"), quiet=True),
)  # fmt: skip
"""Keys are explained in docs/metrics.md."""

_EVALUATED = {
    "reverse_kl": ("Reverse KL on held-out prompts", "nats a token"),
    "mean_length": ("Length of answers", "tokens a row"),
    "truncated": ("Truncated answers", "fraction"),
    "unanswered": ("Without an answer", "fraction"),
}


def _evaluation(keys: Iterable[str]) -> list[Chart]:
    """One chart of each number that evaluations report (``eval/<name>/<number>``), a curve of each name. Numbers of the
    kind ``avg@8`` are shares of the problems."""
    numbers = dict.fromkeys(key.split("/", 2)[2] for key in keys if key.startswith("eval/") and key.count("/") >= 2)
    return [
        Chart(
            _EVALUATION,
            *_EVALUATED.get(number, (number.replace("_", " "), "fraction" if "@" in number else "")),
            (f"eval/*/{number}",),
        )
        for number in numbers
    ]


def make_charts(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """The charts that any of the runs has something for, as plain values for the page.

    Args:
        runs: one, or several to be laid over each other.

    Returns:
        In order of the page: ``section``, ``title``, ``unit``, ``keys``, ``bars``, ``quiet`` (a line of text is
        enough) and ``curves``, each of these with ``run`` (its number), ``label``, ``name`` (of a teacher or
        benchmark; None otherwise), ``at`` (places of its points among the run's steps; None for all of them) and
        ``y``, None where a value was not finite.
    """
    columns = [_columns(run.metrics) for run in runs]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    known = (*CHARTS, *_evaluation(keys))
    rest = [key for key in keys if all(chart.match(key) is None for chart in known)]
    table = sorted(
        (*known, *(Chart(_OTHER, key, "", (key,)) for key in rest)), key=lambda chart: SECTIONS.index(chart.section)
    )
    teachers = [name for run in runs for name in run.teachers]
    made = (_chart(chart, columns, teachers) for chart in table)
    return [chart for chart in made if chart["curves"]]


def _chart(chart: Chart, columns: Sequence[Mapping[str, _Column]], teachers: Sequence[str]) -> dict[str, Any]:
    curves = []
    for run, column in enumerate(columns):
        found = [(key, label) for key in column if (label := chart.match(key)) is not None]
        for key, label in sorted(found, key=_by_place(chart, teachers)):
            named = any("*" in pattern and _pattern(pattern).fullmatch(key) for pattern in chart.keys)
            at, values = column[key]
            curves.append({"run": run, "label": label, "name": label if named else None, "at": at, "y": values})
    return {
        "section": chart.section,
        "title": chart.title,
        "unit": chart.unit,
        "keys": list(chart.keys),
        "bars": chart.bars,
        "quiet": chart.quiet and all(len(set(curve["y"])) == 1 for curve in curves),
        "curves": curves,
    }


def _by_place(chart: Chart, teachers: Sequence[str]) -> Callable[[tuple[str, str]], tuple[int, int, str]]:
    """Curves as the chart lists them; of one pattern the teachers as the recipe does, other names by the alphabet."""

    def place(found: tuple[str, str]) -> tuple[int, int, str]:
        key, label = found
        pattern = next(i for i, pattern in enumerate(chart.keys) if _pattern(pattern).fullmatch(key))
        return pattern, teachers.index(label) if label in teachers else len(teachers), label

    return place


_Column = tuple[list[int] | None, list[float | None]]
"""Places among the run's steps (None for all), and values."""


def _columns(lines: Sequence[Mapping[str, Any]]) -> dict[str, _Column]:
    """Metrics by key. A step that lacks the key has no point; a value that was not finite is None."""
    points: dict[str, tuple[list[int], list[float | None]]] = {}
    for place, line in enumerate(lines):
        for key, value in line.items():
            if key != "step" and (value is None or type(value) in (int, float)):
                at, values = points.setdefault(key, ([], []))
                at.append(place)
                values.append(None if value is None else float(f"{value:.{_DIGITS}g}"))
    return {key: (None if len(at) == len(lines) else at, values) for key, (at, values) in points.items()}
