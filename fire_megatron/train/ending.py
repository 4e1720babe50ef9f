"""What a run prints at its end."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fire_megatron.evaluation.heldout import format_table
from fire_megatron.metrics.jsonl import read_lines
from fire_megatron.metrics.logger import HELD_OUT_FILE
from fire_megatron.metrics.table import ruled

_SCORE = re.compile(r"eval/(.+)/avg@(\d+)")


def end_tables(first: Mapping[str, float], last: Mapping[str, float], targets: Sequence[str]) -> str:
    """The held-out prompts' reverse KL and the benchmarks' scores, before and after, each where there is such.

    Args:
        first: metrics of the evaluation before the first step; empty where there was none.
        last: metrics of the last evaluation.
        targets: name of each held-out prompt's target.
    """
    parts = []
    if any(key.endswith("/reverse_kl") for key in last):
        table = format_table(dict(first), dict(last), targets)
        parts.append(f"Reverse KL (nats a token) of the student's samples on held-out prompts\n{table}")
    if any(map(_SCORE.fullmatch, last)):
        parts.append(f"% right on benchmarks\n{benchmark_table(first, last)}")
    return "\n\n".join(parts)


def held_out_answers(run_dir: Path) -> str:
    """What the student answered to a held-out prompt before and after; empty where it was not asked twice."""
    path = run_dir / HELD_OUT_FILE
    lines = list(read_lines(path)) if path.exists() else []
    if len(lines) < 2:
        return ""
    shown = {"prompt": lines[0]["prompt"]}
    shown |= {f"after step {line['step']}": line["answer"] for line in (lines[0], lines[-1])}
    texts = (f"--- {name}\n{text.strip()}\n" for name, text in shown.items())
    return "\nThe student's likeliest answer to a held-out prompt\n" + "".join(texts)


def benchmark_table(first: Mapping[str, float], last: Mapping[str, float]) -> str:
    """Percentages of each benchmark's n answers, a line a score; the change is in points. Intervals are in the
    evaluations' scores.json."""
    rows = [("benchmark", "score", "before", "after", "change")]
    for match in filter(None, map(_SCORE.fullmatch, sorted(last))):
        name, n = match[1], match[2]
        for kind in ("avg", "pass", "maj") if n != "1" else ("avg",):  # of one answer they are the same
            key = f"eval/{name}/{kind}@{n}"
            before = f"{100 * first[key]:.1f}" if key in first else "-"
            change = f"{100 * (last[key] - first[key]):+.1f}" if key in first else "-"
            rows.append((name, f"{kind}@{n}", before, f"{100 * last[key]:.1f}", change))
    return ruled(rows)
