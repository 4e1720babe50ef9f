#!/usr/bin/env python3
"""What routing saves: answers to their own teachers on ranks of their own, against two other ways, in one run.

    make quickstart   # or: make demo, and tools/convert.py for student, math and code
    python benchmarks/router.py --models demo/megatron [--rounds 2 --steps 4 --rollouts 16 --new-tokens 48]

Runs `fire_megatron.train` on 4 processes of one thread each, three ways in turn on the same prompts:

- routed: the student on ranks 0-1, a teacher on rank 2, another on rank 3; each answer goes to its own teacher, while
  the rest is being sampled.
- every row, every teacher: the same ranks, all answers to both teachers, as the published code has it.
- colocated in turn: student and both teachers on all 4 ranks; the teachers score one after the other when everything
  has been sampled.

Seconds are those from the start of sampling to the last score (`time/rollout` + `time/teacher_exposed`), the median
over the steps after the first, of the best round; `teachers` is the sum of what each took. Bytes are those of requests
and answers between ranks, a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import sides
from fire_megatron.metrics.jsonl import read_metrics

RECIPES = sides.REPOSITORY / "recipes"
DATA = RECIPES / "data"
APART = {"student.ranks": "0-1", "teachers.math.ranks": "2-2", "teachers.code.ranks": "3-3"}
WAYS: dict[str, tuple[dict[str, str], bool]] = {
    "routed": (APART, False),
    "every row, every teacher": (APART, True),
    "colocated in turn": ({}, False),
}
"""Name -> overrides of the recipe, and whether all rows go to both teachers."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder of converted student, math and code")
    parser.add_argument("--rounds", type=int, default=2, help="repeat all ways in turn; the best round counts")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=48)
    sides.add_toy(parser)
    return parser


def _prompts(folder: Path, both: bool) -> list[Path]:
    """The training prompts in turn, under their own labels or under both."""
    rows = zip(
        *((DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in ("math", "code")), strict=True
    )
    path = folder / f"{'both' if both else 'own'}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for row in (json.loads(line) for pair in rows for line in pair):
            file.write(json.dumps({**row, "label": {"math": 0.5, "code": 0.5}} if both else row) + "\n")
    return [path]


def _run(args: argparse.Namespace, way: str) -> dict[str, float]:
    overrides, both = WAYS[way]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = [{"path": str(path)} for path in _prompts(folder, both)]
        settings: dict[str, Any] = {
            "run.dir": folder / "run",
            "run.steps": args.steps,
            "run.threads": 1,
            **{
                f"{role}.checkpoint": args.models / role.split(".")[-1]
                for role in ("student", "teachers.math", "teachers.code")
            },
            "data.train": json.dumps(sources),
            "data.shuffle": "false",
            "rollout.prompts_per_step": args.rollouts,
            "rollout.max_new_tokens": args.new_tokens,
            "optimizer.warmup_steps": 0,
            "evaluation": "{}",
            "checkpoint.final": "false",
            **(dict.fromkeys(overrides, "0-0") if args.toy else overrides),
        }
        sides.train(1 if args.toy else 4, settings, recipe=RECIPES / "smollm2_two_teachers.yaml", toy=args.toy)
        lines = read_metrics(folder / "run")[1:]
    return _summary(lines)


def _summary(lines: list[dict[str, float]]) -> dict[str, float]:
    """Of the steps after the first."""

    read: dict[str, Callable[[dict[str, float]], float]] = {
        "seconds": lambda line: line["time/rollout"] + line["time/teacher_exposed"],
        "rollout": lambda line: line["time/rollout"],
        "exposed": lambda line: line["time/teacher_exposed"],
        "teachers": lambda line: sum(v for k, v in line.items() if k.startswith("time/teacher/")),
        "router": lambda line: line["router/bytes"],
    }
    return {name: statistics.median(map(value, lines)) for name, value in read.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Run all ways in turn and print the table."""
    args = _parser().parse_args(argv)
    args.models = args.models.resolve()
    best: dict[str, dict[str, float]] = {}
    for way in tqdm([way for _ in range(args.rounds) for way in WAYS], unit="run"):
        found = _run(args, way)
        if way not in best or found["seconds"] < best[way]["seconds"]:
            best[way] = found
    ours = best["routed"]
    print(f"{args.rollouts} answers of up to {args.new_tokens} tokens a step, 4 processes of one thread")
    print(f"{'':26}{'seconds':>9}{'sampling':>10}{'exposed':>9}{'teachers':>10}{'bytes':>10}{'seconds':>9}{'bytes':>7}")
    for way, values in best.items():
        ratios = f"{ours['seconds'] / values['seconds']:9.2f}{ours['router'] / max(values['router'], 1):7.2f}"
        numbers = f"{values['seconds']:9.2f}{values['rollout']:10.2f}{values['exposed']:9.2f}{values['teachers']:10.2f}"
        print(f"{way:26}{numbers}{values['router']:10.0f}{ratios}")
    print("ratios: routed to each way; below 1 routed takes less")
    print(json.dumps(best))


if __name__ == "__main__":
    main()
