"""In the process of one check: run its function and leave its result."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
import traceback
from typing import TextIO

from gpu_checks.check import FAILED, LEFT_OUT, OK, PROJECT, Check, Context, NotHere, Result
from gpu_checks.table import CHECKS


def work(check: Check, context: Context) -> Result:
    """Run a check. Never raises: what goes wrong is the result."""
    started = time.monotonic()

    def result(state: str, told: str, **figures: object) -> Result:
        return Result(check.name, state, round(time.monotonic() - started, 1), told, figures)

    try:
        module, _, function = check.function.partition(":")
        found = getattr(importlib.import_module(f"gpu_checks.{module}"), function)(context, **check.options)
    except NotHere as reason:
        return result(LEFT_OUT, str(reason))
    except (Exception, SystemExit) as error:  # SystemExit: of a command that a check has run
        traceback.print_exc()
        return result(FAILED, f"{type(error).__name__}: {error}".replace("\n", " ")[:400])
    missing = [name for name in check.figures if name not in found.figures]
    problems = [*found.problems, *(f"{name} is missing" for name in missing)]
    told = "; ".join([*problems, found.told])
    return result(FAILED if problems else OK, told, **found.figures)


def work_on(request: str) -> None:
    """Args: request: of the runner, see ``workers.py``. Leaves the result in the context's folder."""
    said = json.loads(request)
    check = next(check for check in CHECKS if check.name == said["check"])
    context = Context(**said["context"])
    context.leave(work(check, context))


def serve(requests: TextIO) -> None:
    """Import what checks need, then give each request a process of its own, made by a fork of this one.

    It says on standard output ``ready`` when it is, and of each request the process's id and then its exit code, a line
    each. Nothing here touches a GPU, which a forked process could not use any more then.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    _import_everything()
    print("ready", file=answers, flush=True)
    for line in requests:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            _be_the_check(line)
        print(child, file=answers, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def _import_everything() -> None:
    for name in ("torch", "fire_megatron.cli.train", "fire_megatron.train.lifecycle", "fire_megatron.plan.plan"):
        importlib.import_module(name)
    with contextlib.suppress(Exception):  # who needs it will say so
        from transformers import AutoTokenizer, Qwen3ForCausalLM, Qwen3MoeForCausalLM

        assert AutoTokenizer and Qwen3ForCausalLM and Qwen3MoeForCausalLM  # they are imported when first asked for


def _be_the_check(request: str) -> None:
    """In the forked process: a session of its own, output to the log, and no way back."""
    code = 1
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log = os.open(json.loads(request)["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(PROJECT)
        work_on(request)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
