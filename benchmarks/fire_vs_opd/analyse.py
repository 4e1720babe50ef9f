#!/usr/bin/env python3
"""Table and plot from whatever runs of the study are done.

    python -m benchmarks.fire_vs_opd.analyse --out runs/fire_vs_opd --to benchmarks/fire_vs_opd/results

Writes results.csv (a line a run), table.md and plot.png. Intervals are 95 % Student-t intervals over seeds. Differences
are paired: an arm's accuracy minus that of plain OPD of the same seed, which began with the same student and prompts.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.fire_vs_opd.evaluate import TEMPERATURES
from benchmarks.fire_vs_opd.study import ARMS, CONTROLS
from benchmarks.fire_vs_opd.tasks import DOMAINS

NAMES = {
    "opd": "plain OPD",
    "filter": "filter only",
    "reweight": "reweight only",
    "fire": "FiRe (both)",
    "random": "as many dropped, at random",
}
COLOURS = {"opd": "#444444", "filter": "#1f77b4", "reweight": "#2ca02c", "fire": "#d62728", "random": "#ff7f0e"}
# Quantile 0.975 of Student's t, from 1 degree of freedom on.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
      2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045)  # fmt: skip
_WINDOW = 10
"""Steps that a point of the learning curve is the mean of."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % t-interval (not a number for a single value)."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return mean, math.nan
    return mean, _T[min(count - 1, len(_T)) - 1] * statistics.stdev(values) / math.sqrt(count)


def read_results(out: Path) -> tuple[dict[tuple[str, int], dict[str, Any]], dict[str, dict[str, Any]]]:
    """Runs by arm and seed, of seeds of which every arm is done; and models measured before, by name.

    Raises:
        ValueError: arms of a seed that did not begin with the same rollouts or did not get the same prompts.
    """
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "results").glob("*.json"))]
    runs = {(r["arm"], r["seed"]): r for r in found if "arm" in r and not r["changes"]}
    whole = [seed for seed in {seed for _, seed in runs} if all((arm, seed) in runs for arm in ARMS)]
    for seed in whole:
        for what in ("first_rollouts", "prompts", "rows_sampled"):
            if len({run[what] for (_, of), run in runs.items() if of == seed}) > 1:
                raise ValueError(f"{out}: {what} of seed {seed} differ between arms, which can then not be compared")
    return {key: run for key, run in runs.items() if key[1] in whole}, {r["model"]: r for r in found if "model" in r}


def done_arms(runs: Mapping[tuple[str, int], object]) -> list[str]:
    """Arms that every seed has; the four of FiRe, and controls where they were run."""
    seeds = {seed for _, seed in runs}
    return [arm for arm in (*ARMS, *CONTROLS) if all((arm, seed) in runs for seed in seeds)]


def accuracy(result: dict[str, Any], label: str, way: str) -> float:
    """In per cent; ``both`` is the mean of the domains."""
    if label == "both":
        return statistics.fmean(accuracy(result, one, way) for one in DOMAINS)
    return 100 * result["accuracy"][label][way]


def table(runs: dict[tuple[str, int], dict[str, Any]], models: dict[str, dict[str, Any]]) -> str:
    """Markdown: accuracy of every arm, then differences to plain OPD."""
    seeds = sorted({seed for _, seed in runs})
    columns = [(label, way) for way in TEMPERATURES for label in (*DOMAINS, "both")]
    head = "| | " + " | ".join(f"{label}, {way}" for label, way in columns) + " |\n|---" + "|---" * len(columns) + "|\n"

    def line(name: str, cells: Sequence[str]) -> str:
        return f"| {name} | " + " | ".join(cells) + " |\n"

    def spread(values: Sequence[float], sign: str = "") -> str:
        mean, half = interval(values)
        return f"{mean:{sign}.1f} ± {half:.1f}"

    text = f"Accuracy in per cent on held-out problems, mean ± half of a 95 % t-interval over {len(seeds)} seeds.\n\n"
    text += head
    for label in DOMAINS:
        text += line(f"{label} teacher", [f"{accuracy(models[label], *column):.1f}" for column in columns])
    before = [models[f"student_{seed}"] for seed in seeds]
    text += line("student before", [spread([accuracy(model, *column) for model in before]) for column in columns])
    for arm in done_arms(runs):
        text += line(NAMES[arm], [spread([accuracy(runs[arm, s], *column) for s in seeds]) for column in columns])
    text += f"\nDifference to plain OPD of the same seed, percentage points.\n\n{head}"
    for arm in done_arms(runs)[1:]:
        cells = [
            spread([accuracy(runs[arm, s], *column) - accuracy(runs["opd", s], *column) for s in seeds], "+")
            for column in columns
        ]
        text += line(NAMES[arm], cells)
    return text + "\n" + _costs(runs, seeds)


def _costs(runs: dict[tuple[str, int], dict[str, Any]], seeds: Sequence[int]) -> str:
    text = "| | rows sampled | rows trained on | tokens sampled | reverse KL of the last 10 steps, math, code |\n"
    text += "|---|---|---|---|---|\n"
    for arm in done_arms(runs):
        mine = [runs[arm, seed] for seed in seeds]
        kl = [statistics.fmean(statistics.fmean(r["reverse_kl"][label][-10:]) for r in mine) for label in DOMAINS]
        cells = (
            f"{statistics.fmean(r['rows_sampled'] for r in mine):.0f}",
            f"{100 * statistics.fmean(r['keep_ratio'] for r in mine):.1f} %",
            f"{statistics.fmean(r['tokens_sampled'] for r in mine):.0f}",
            ", ".join(f"{value:.4f}" for value in kl),
        )
        text += f"| {NAMES[arm]} | " + " | ".join(cells) + " |\n"
    return text


def lines_of_csv(out: Path) -> str:
    """A line for every model measured before, every run and every run of the pilot."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [(label, way) for label in DOMAINS for way in TEMPERATURES]
    head = ["result", *(f"{label}_{way}" for label, way in columns), "keep_ratio", "rows_sampled", "tokens_sampled"]
    writer.writerow([*head, "train_seconds"])
    for path in sorted((out / "results").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        values = [result["accuracy"][label][way] for label, way in columns]
        costs = [result.get(key, "") for key in ("keep_ratio", "rows_sampled", "tokens_sampled", "train_seconds")]
        cells = [round(value, 4) if isinstance(value, float) else value for value in (*values, *costs)]
        writer.writerow([path.stem, *cells])
    return text.getvalue()


def _windows(values: Sequence[float]) -> list[float]:
    return [statistics.fmean(values[i : i + _WINDOW]) for i in range(0, len(values), _WINDOW)]


def _draw_points(axis: Any, arms: Sequence[str], values: Callable[[str, str, str], list[float]]) -> None:
    """Mean, interval and every seed, by domain and way of sampling; ``values`` of arm, domain and way."""
    groups = [(label, way) for way in TEMPERATURES for label in DOMAINS]
    for place, (label, way) in enumerate(groups):
        for i, arm in enumerate(arms):
            x, of_seeds = place + 0.15 * (i - (len(arms) - 1) / 2), values(arm, label, way)
            mean, half = interval(of_seeds)
            axis.scatter([x + 0.04] * len(of_seeds), of_seeds, s=8, color=COLOURS[arm], alpha=0.5)
            axis.errorbar(x, mean, half, fmt="o", capsize=3, color=COLOURS[arm], label=None if place else NAMES[arm])
    axis.set_xticks(range(len(groups)), [f"{label}\n{way}" for label, way in groups])


def plot(runs: dict[tuple[str, int], dict[str, Any]], models: dict[str, dict[str, Any]], path: Path) -> None:
    """Above: accuracy after, and its difference to plain OPD; below: accuracy of the rollouts, step by step."""
    try:
        import matplotlib
    except ImportError:
        print("no plot without matplotlib; pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    seeds, arms = sorted({seed for _, seed in runs}), done_arms(runs)
    figure, ((after, difference), curves) = plt.subplots(2, 2, figsize=(12, 8))

    def of_runs(arm: str, label: str, way: str) -> list[float]:
        return [accuracy(runs[arm, seed], label, way) for seed in seeds]

    def against_plain(arm: str, label: str, way: str) -> list[float]:
        return [mine - plain for mine, plain in zip(of_runs(arm, label, way), of_runs("opd", label, way), strict=True)]

    _draw_points(after, arms, of_runs)
    for place, (label, way) in enumerate((label, way) for way in TEMPERATURES for label in DOMAINS):
        start = statistics.fmean(accuracy(models[f"student_{seed}"], label, way) for seed in seeds)
        name = None if place else "before"
        after.hlines(start, place - 0.4, place + 0.4, colors="black", linestyles="dotted", label=name)
    after.set_ylabel("accuracy on held-out problems, %")
    after.set_ylim(bottom=0)
    after.set_title(f"after distillation: mean, 95 % interval, {len(seeds)} seeds (dots)")
    _draw_points(difference, arms[1:], against_plain)
    difference.axhline(0, color=COLOURS["opd"])
    difference.set_ylabel("percentage points")
    difference.set_title("difference to plain OPD of the same seed")
    for axis, label in zip(curves, DOMAINS, strict=True):
        for arm in arms:
            of_seeds = [_windows(runs[arm, seed]["rollout_accuracy"][label]) for seed in seeds]
            means = [100 * statistics.fmean(at) for at in zip(*of_seeds, strict=True)]
            axis.plot([_WINDOW * (i + 0.5) for i in range(len(means))], means, color=COLOURS[arm], label=NAMES[arm])
        axis.set_title(f"{label}: rollouts that were right, mean of {_WINDOW} steps and all seeds")
        axis.set_xlabel("step")
        axis.set_ylabel("%")
        axis.set_ylim(bottom=0)
    figure.legend(*after.get_legend_handles_labels(), loc="lower center", ncols=len(arms) + 1, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> None:
    """Read, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the study's folder")
    parser.add_argument("--to", type=Path, help="folder for table and plot; the study's own by default")
    args = parser.parse_args(argv)
    runs, models = read_results(args.out)
    if not runs:
        raise SystemExit(f"{args.out}: no seed has all of its runs yet; benchmarks.fire_vs_opd.run makes them")
    target = args.to or args.out
    target.mkdir(parents=True, exist_ok=True)
    text = table(runs, models)
    (target / "table.md").write_text(text, encoding="utf-8")
    (target / "results.csv").write_text(lines_of_csv(args.out), encoding="utf-8")
    plot(runs, models, target / "plot.png")
    print(text)


if __name__ == "__main__":
    main()
