"""Judges answers in a process of their own, so that no answer can stop or end a run."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Self

from fire_megatron.config.errors import DataError
from fire_megatron.evaluation.judge_worker import PUBLISHED, READY
from fire_megatron.evaluation.notation import key
from fire_megatron.platform.watch import tick

LONGEST = 1000
"""Characters; a longer answer is right only if it is the right one to the letter."""
_WALL = 20
"""Seconds of patience a second of CPU, with a judge that has to share it."""
_STARTING = 300.0
"""Seconds within which a judge has imported what it needs, also from a slow file system."""
_PACKAGE = Path(__file__).resolve().parents[2]


def require_math_verify() -> None:
    """Raises DataError: what judges answers is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise DataError("answers are judged by math-verify, which is not installed; pip install math-verify")


class Judge:
    """Whether answers are right. May be used from any thread; one judgement at a time."""

    def __init__(self, *, seconds: float = 5.0) -> None:
        """Args: seconds: CPU time of a judgement, after which the answer counts as wrong.

        Raises:
            DataError: math-verify is not installed.
        """
        require_math_verify()
        self.seconds = seconds
        self.unjudged = 0
        """Answers counted as wrong because judging them took too long."""
        self._endless: set[str] = set()
        """Answers on which a judgement ran out of time."""
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._remembered = functools.lru_cache(maxsize=2**16)(self._verdict)

    def equal(self, right: str, given: str | None) -> bool:
        """Whether ``given`` says what ``right`` says; None, empty, unreadable or endless is wrong."""
        tick()
        if given is None or not given.strip():
            return False
        if given.strip() == right.strip():
            return True
        if len(given) > LONGEST:
            return False
        with self._lock:
            return self._remembered(right, given)

    def published_verdict(self, right: str, response: str) -> bool:
        """Whether math-verify, by its defaults, finds the right answer in a whole response."""
        tick()
        with self._lock:
            return bool(self._ask(right, response, PUBLISHED))

    def classes(self, answers: list[str | None]) -> list[int | None]:
        """Equal answers get equal numbers, counted from 0 in order of appearance; None stays None.

        Each answer is compared with the first of every class so far, unless it is written as an earlier one. One on
        which a judgement has run out of time is equal only to what is written as it is.
        """
        firsts: list[str] = []
        places: dict[str, int] = {}
        found: list[int | None] = []
        for answer in answers:
            if answer is None or not answer.strip():
                found.append(None)
                continue
            written = key(answer) if len(answer) <= LONGEST else answer
            if written not in places:
                places[written] = self._place(firsts, answer)
            found.append(places[written])
        return found

    def _place(self, firsts: list[str], answer: str) -> int:
        """Index of the first that is equal to the answer; the answer becomes the last where none is."""
        for place, first in enumerate(firsts):
            if not {first, answer} & self._endless:
                before = self.unjudged
                if self.equal(first, answer):
                    return place
                if self.unjudged > before and self._simple(answer):
                    self._endless = self._endless - {answer} | {first}
        firsts.append(answer)
        return len(firsts) - 1

    def _simple(self, answer: str) -> bool:
        """Whether an answer can be judged against a number, so that it is not why another judgement did not end."""
        before = self.unjudged
        self.equal("0", answer)
        return self.unjudged == before

    def close(self) -> None:
        """End the process. The judge may be used again."""
        with self._lock:
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([str(_PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fire_megatron.evaluation.judge_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Sets are ordered by hashes in places; a verdict must not depend on that.
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"},
            start_new_session=True,  # Ctrl-C is for the run, which ends this one
        )
        if _exchange(process, self.seconds, patience=_STARTING) != READY:
            process.kill()
            process.communicate()
            raise RuntimeError("the judge does not start; python -m fire_megatron.evaluation.judge_worker says why")
        return process

    def _verdict(self, right: str, given: str) -> bool:
        verdict = self._ask(right, given)
        if verdict is None:
            self.unjudged += 1
            self._endless.add(given)
        return verdict is True

    def _ask(self, *message: str) -> object:
        """None for what takes too long."""
        if self._process is None:
            self._process = self._start()
        verdict = _exchange(self._process, message, patience=_STARTING + _WALL * self.seconds)
        if verdict is None:
            self._end()
        return verdict


def _exchange(process: subprocess.Popen[bytes], message: object, *, patience: float) -> object:
    """Send a line and wait for one; None when the process has ended or is silent for so many seconds."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(message).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    descriptor, line, deadline = process.stdout.fileno(), b"", time.monotonic() + patience
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while not line.endswith(b"\n"):
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return None
        part = os.read(descriptor, 4096)
        if not part:
            return None
        line += part
    return json.loads(line)
