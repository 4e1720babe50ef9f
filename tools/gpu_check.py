#!/usr/bin/env python3
"""What the project does on one GPU, and how fast, in a few minutes; docs/gpu.md tells how to read it.

    python tools/gpu_check.py --out gpu_results                     # on a machine with a GPU
    python tools/gpu_check.py --out gpu_results --device cpu        # the same code with toy sizes, in a minute

Checks come in order of worth. Each is a process of its own with a time limit, its line is printed as soon as it ends,
and whatever becomes of it, the next one follows while the budget lasts. OUT/results.json and OUT/results.md are
written after each; OUT/log.txt has what they printed. Random weights, no download.
Exit codes: 0 nothing has failed, 1 something has, 2 a mistake in the arguments, 130 interrupted.
"""

import argparse
import shlex
import signal
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))
_ENDING = (signal.SIGTERM, signal.SIGHUP)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480, help="budget of all checks together (480)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this check, or all NAME_*; repeat")
    parser.add_argument("--out", type=Path, default=Path("gpu_results"), help="folder of the results (gpu_results)")
    parser.add_argument("--work", type=Path, help="folder for models and runs (a temporary one)")
    parser.add_argument("--commit", help="of this checkout, where git cannot tell")
    parser.add_argument("--limit", action="append", default=[], metavar="NAME=S", help="seconds allowed for one check")
    parser.add_argument("--fresh", action="store_true", help="start each process from nothing, not by a fork")
    parser.add_argument("--list", action="store_true", help="say what there is, and leave")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser


def _limits(given: list[str], names: set[str]) -> dict[str, float]:
    limits = {}
    for text in given:
        name, _, seconds = text.partition("=")
        if name not in names:
            raise ValueError(f"--limit {text}: no check is called {name!r}")
        limits[name] = float(seconds)
    return limits


def _run(args: argparse.Namespace, work: Path) -> int:
    from gpu_checks.check import Context
    from gpu_checks.record import about
    from gpu_checks.runner import Runner, chosen
    from gpu_checks.table import CHECKS
    from gpu_checks.workers import Workers

    try:
        checks = chosen(CHECKS, args.only)
        limits = _limits(args.limit, {check.name for check in CHECKS})
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.list:
        spent = 0.0
        for check in checks:
            spent += check.seconds
            where = ", on a GPU only" if check.gpu else ""
            print(f"{check.name:28} about {check.seconds:3g} s, with those before {spent:4g} s{where}")
        return 0
    out, results = args.out.resolve(), work / "results"
    for folder in (out, results):
        folder.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    log.write_text("")
    context = Context(args.device, str(work), str(results))
    runner = Runner(
        checks,
        context,
        Workers(HERE, context, log, warm=not args.fresh),
        seconds=args.seconds,
        out=out,
        about=about("python " + shlex.join(sys.argv), args.commit),
        limits=limits,
        say=lambda line: print(line, flush=True),
    )
    passed = runner.run()
    print(f"written to {out}")
    return 0 if passed else 1


def _interrupt(number: int, frame: object) -> None:
    """So that what has been started is ended, whatever ends this process."""
    for each in _ENDING:
        signal.signal(each, signal.SIG_IGN)  # once is enough
    raise KeyboardInterrupt


def main() -> int:
    """See the top."""
    args = _parser().parse_args()
    if args.worker:
        from gpu_checks.worker import work_on

        work_on(args.worker)
        return 0
    if args.serve:
        from gpu_checks.worker import serve

        serve(sys.stdin)
        return 0
    for number in _ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, _interrupt)
    try:
        if args.work:
            return _run(args, args.work.resolve())
        with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
            return _run(args, Path(folder))
    except KeyboardInterrupt:
        print("interrupted; what was found so far is written", file=sys.stderr, flush=True)
        return 130


if __name__ == "__main__":
    sys.exit(main())
