#!/usr/bin/env python3
"""What a filter would have dropped from the rollouts of plain OPD: how many of them were right, how much KL they hold.

    python -m benchmarks.fire_vs_opd.dropped --out runs/fire_vs_opd

Reads the samples of the runs of plain OPD, scores those of every tenth step with their teacher (in transformers), and
takes the same percentile by teacher within each step as the filter does.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.fire_vs_opd.pretrain import EOS, PAD, VOCABULARY
from benchmarks.fire_vs_opd.tasks import DOMAINS, is_right

EVERY, PERCENTILE = 10, 20.0


def mean_log_probs(model: Any, rows: Sequence[dict[str, Any]]) -> torch.Tensor:
    """[B] mean log-probability of each row's response tokens, its end included where it has one."""
    texts = [[VOCABULARY[character] for character in row["prompt"] + row["response"]] for row in rows]
    ids = [[*text, *([] if row["truncated"] else [VOCABULARY[EOS]])] for text, row in zip(texts, rows, strict=True)]
    width = max(map(len, ids))
    padded = torch.tensor([row + [VOCABULARY[PAD]] * (width - len(row)) for row in ids])
    with torch.no_grad():
        log_probs = model(padded[:, :-1]).logits.log_softmax(-1).gather(-1, padded[:, 1:, None])[..., 0]
    spans = [(len(row["prompt"]) - 1, len(tokens) - 1) for row, tokens in zip(rows, ids, strict=True)]
    return torch.stack([log_probs[i, start:end].mean() for i, (start, end) in enumerate(spans)])


def shares(model: Any, label: str, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of one domain's rollouts, by step in ``rows``: right among kept and dropped, and the dropped rows' share of the
    summed log-ratio of student to teacher."""
    by_step, marks = defaultdict(list), {True: [], False: []}
    for row in rows:
        by_step[row["step"]].append(row)
    kl = {True: 0.0, False: 0.0}
    for step in by_step.values():
        scores = mean_log_probs(model, step)
        keep = (scores >= torch.quantile(scores, PERCENTILE / 100)).tolist()
        for row, kept in zip(step, keep, strict=True):
            marks[kept].append(is_right(label, row["prompt"], row["response"], truncated=row["truncated"]))
            kl[kept] += row["reverse_kl"]
    return {
        "kept": 100 * sum(marks[True]) / len(marks[True]),
        "dropped": 100 * sum(marks[False]) / len(marks[False]),
        "kl": 100 * kl[False] / (kl[True] + kl[False]),
        "rows": 100 * len(marks[False]) / len(rows),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the study's folder")
    args = parser.parse_args(argv)
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    rows: dict[str, list[dict[str, Any]]] = {label: [] for label in DOMAINS}
    for number, path in enumerate(sorted(args.out.glob("runs/opd_?/samples.jsonl"))):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["step"] % EVERY == 1:
                rows[row["teacher"]].append({**row, "step": (number, row["step"])})
    print("| | rows dropped | right among the kept | right among the dropped | the dropped rows' share of the KL |")
    print("|---|---|---|---|---|")
    for label, of_label in rows.items():
        found = shares(AutoModelForCausalLM.from_pretrained(args.out / "models" / f"hf_{label}"), label, of_label)
        cells = [f"{found[key]:.1f} %" for key in ("rows", "kept", "dropped", "kl")]
        print(f"| {label} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
