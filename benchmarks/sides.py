"""How benchmarks run what they measure: each side in a process, so that its memory and threads are its own."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[1]


def add_toy(parser: argparse.ArgumentParser) -> None:
    """``--toy``, for a look at whether the benchmark works."""
    parser.add_argument("--toy", action="store_true", help="all in this process: to see that it runs, not how fast")


def run(
    *arguments: object, toy: bool = False, python: Path | str = sys.executable, threads: int = 1, **variables: str
) -> str:
    """What ``python ARGUMENTS`` prints; its failure ends the benchmark and is shown.

    Args:
        arguments: a script or ``-m`` and a module, and theirs.
        toy: in this process instead, with its Python and environment.
        threads: of a process.
        variables: of its environment.
    """
    words = [str(argument) for argument in arguments]
    if toy:
        return _run_here(words)
    own = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY), **variables}
    done = subprocess.run([str(python), *words], env={**os.environ, **own}, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{' '.join(words[:6])} ... failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def _run_here(words: list[str]) -> str:
    printed = io.StringIO()
    module = words[0] == "-m"
    with mock.patch.object(sys, "argv", words[module:]), contextlib.redirect_stdout(printed):
        try:
            if module:
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
    return printed.getvalue()


def train(processes: int, overrides: dict[str, object], *, recipe: Path, toy: bool, threads: int = 1) -> str:
    """Run a recipe on so many processes, with these overrides."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes > 1 else []
    changes = [f"{key}={value}" for key, value in overrides.items()]
    return run(*launcher, "-m", "fire_megatron.train", "--recipe", recipe, *changes, toy=toy, threads=threads)


def has_trl(python: Path | None) -> bool:
    """Whether there is a TRL to compare with in that Python's environment; says so where there is none."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('trl') is None)"
    if python is not None and subprocess.run([str(python), "-c", code]).returncode == 0:
        return True
    print(f"no comparison with TRL: {f'{python} has no trl' if python else 'no --peer-python with trl is given'}")
    return False
