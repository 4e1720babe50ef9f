#!/usr/bin/env python3
"""Does FiRe learn more than plain on-policy distillation from the same rollouts? Two specialists, a small student.

    python -m benchmarks.fire_vs_opd.run --out runs/fire_vs_opd --seeds 5
    python -m benchmarks.fire_vs_opd.run --out runs/fire_vs_opd --pilot 3e-4 1e-3 3e-3   # the learning rate, before
    python -m benchmarks.fire_vs_opd.analyse --out runs/fire_vs_opd                      # table and plot

Trains what is missing: a specialist for each domain, a student for each seed, then every arm of every seed with
`fire_megatron.train`. Broken off, the same command goes on with the first run that has no result. The pilot runs plain
OPD alone, with a student of a seed that the study does not use. README.md in this folder tells the rest.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks import sides
from benchmarks.fire_vs_opd.study import ARMS, CONTROLS, Study
from benchmarks.fire_vs_opd.tasks import DOMAINS

PILOT_SEED = 900


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of models, runs and results")
    parser.add_argument("--seeds", type=int, default=5)
    arms = [*ARMS, *CONTROLS]
    parser.add_argument("--arms", nargs="+", choices=arms, default=list(ARMS), help="the four of FiRe by default")
    parser.add_argument("--pilot", type=float, nargs="+", metavar="LR", help="only plain OPD at these learning rates")
    sides.add_toy(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Do what is missing."""
    import torch

    args = _parser().parse_args(argv)
    torch.set_num_threads(1)
    study = Study(args.out.resolve(), say=lambda text: tqdm.write(text), toy=args.toy)
    for label in DOMAINS:
        study.prompts(label)
        study.teacher(label)
        study.measure(label)
    if args.pilot:
        runs = [(PILOT_SEED, "opd", {"optimizer__lr": rate}) for rate in args.pilot]
    else:
        runs = [(seed, arm, {}) for seed in range(args.seeds) for arm in args.arms]
    for seed, arm, changes in tqdm(runs, desc="pilot" if args.pilot else "study", unit="run"):
        study.student(seed)
        study.measure(f"student_{seed}")
        study.distil(arm, seed, **changes)


if __name__ == "__main__":
    main()
