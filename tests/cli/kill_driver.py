"""Run by ``test_random_kills.py``: starts a recipe in forks and kills them at random moments, until it has been killed
so many times and then to its end.

A process of its own, which has imported all that a run needs and computed nothing, so that a fork is a fresh start
without the seconds that the imports take.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import fire_megatron.train.lifecycle  # noqa: F401  what a run imports
from fire_megatron.checkpoint.steps import saved_steps
from fire_megatron.cli.train import main


def start(arguments: list[str], log: Path) -> int:
    """The process id of a fork that runs the training command."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log.open("a") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        torch.set_num_threads(1)
        code = main(arguments)
    finally:
        sys.stdout.flush()
        os._exit(code)


def last_step(metrics: Path) -> int:
    """Last step that the run has told of."""
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def kill_and_start_again(recipe: str, run_dir: Path, kills: int, seed: int) -> list[dict]:
    """One entry a kill: what had been completed before it, and what is there after it."""
    draw, history = random.Random(seed), []
    checkpoints, metrics, log = run_dir / "checkpoints", run_dir / "metrics.jsonl", run_dir.with_suffix(".log")
    while len(history) < kills:
        begun = max(saved_steps(checkpoints), default=0)
        child = start(["--recipe", recipe], log)
        # From before the first step on, through steps and saves; later kills come sooner or later.
        deadline = time.monotonic() + 60
        wanted = begun + draw.randint(0, 2)
        while max(saved_steps(checkpoints), default=0) < wanted and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.5))
        before = {"told": last_step(metrics), "saved": saved_steps(checkpoints)}
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        died = os.WIFSIGNALED(status)
        history.append({"died": died, "begun": begun, **before, "after": saved_steps(checkpoints)})
        if not died:
            break
    child = start(["--recipe", recipe], log)
    history.append({"code": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])})
    return history


if __name__ == "__main__":
    print(json.dumps(kill_and_start_again(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
