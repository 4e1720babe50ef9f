"""``fire-megatron report``: a run as an HTML page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fire_megatron.cli.command import check_least, telling_mistakes

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


@telling_mistakes
def main(argv: Sequence[str] | None = None) -> int:
    """Write the page. Exit codes: 0 written, 2 a mistake in the input."""
    args = _parser().parse_args(argv)
    from fire_megatron.report.page import write_report
    from fire_megatron.report.read import read_run

    check_least(args, 0, "max_samples", "max_tokens")
    target = args.out or Path(args.runs[0]) / _FILE
    runs = [read_run(run, max_samples=args.max_samples, max_tokens=args.max_tokens) for run in args.runs]
    write_report(runs, target)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB; open it in a browser")
    return 0
