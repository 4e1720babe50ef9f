"""The reporting command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fire_megatron.config.errors import UserError

_FILE = "report.html"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fire-megatron report",
        description="Write a run's curves and sampled trajectories as one HTML page that opens without a network.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run.dir of a run; of several, curves are overlaid")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"the page ({_FILE} in the first RUN)")
    parser.add_argument(
        "--max-samples", type=int, default=1000, metavar="N", help="trajectories of each run at most (1000)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=1_000_000, metavar="N", help="tokens of those of a run at most (1000000)"
    )
    return parser


def _report(args: argparse.Namespace) -> Path:
    from fire_megatron.report.page import write_report
    from fire_megatron.report.read import read_run

    for name in ("max_samples", "max_tokens"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: give at least 0")
    target = args.out or Path(args.runs[0]) / _FILE
    bounds = {"max_samples": args.max_samples, "max_tokens": args.max_tokens}
    write_report([read_run(run, **bounds) for run in args.runs], target)
    return target


def main(argv: Sequence[str] | None = None) -> int:
    """``fire-megatron report``. Exit codes: 0 written, 2 a mistake in the input."""
    args = _parser().parse_args(argv)
    try:
        target = _report(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB; open it in a browser")
    return 0
