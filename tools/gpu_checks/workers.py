"""Processes for checks, each with a limit. Imports no torch, so that nothing of a GPU can take the runner along.

Importing torch, megatron-core and Transformer Engine takes long, and a GPU's minutes may be few. So one process
imports them once and is forked for every check (``worker.serve``). If that process dies, or what it has imported has
touched the GPU, the remaining checks start from nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from gpu_checks.check import PROJECT, Context

_POISONED = re.compile(r"in forked subprocess|initialization error|CUDA_ERROR_NOT_INITIALIZED")
"""What CUDA says in a process whose parent had used it."""
TIMED_OUT = 124


class Workers:
    """Gives checks their processes."""

    def __init__(self, tool: Path, context: Context, log: Path, *, warm: bool = True) -> None:
        """Args: tool: the script that serves ``--worker`` and ``--serve``; log: what the processes print; warm: fork
        one that has imported everything."""
        self._tool, self._context, self.log, self._warm = tool, context, log, warm
        self._proved = False
        """Whether a forked process has come to its end."""
        self._busy: int | None = None
        """Process of the check that is running."""
        self._server: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()
        self._mark = f"FIRE_GPU_CHECK={os.getpid()}-{time.monotonic_ns()}"
        """In the environment of all that a check starts, whatever session or parent it has now."""
        name, _, value = self._mark.partition("=")
        path = os.pathsep.join(p for p in (str(PROJECT), os.environ.get("PYTHONPATH", "")) if p)
        self._environment = {
            **os.environ,
            name: value,
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asks for a GPU without touching it
        }

    def start(self, limit: float) -> bool:
        """Start the process that is forked and wait until it is ready; whether it is."""
        if self._warm:
            self._serve()
            if self._answer(limit) != "ready":
                self._leave_warm()
        return self._warm

    def run(self, check: str, limit: float) -> int:
        """Exit code of a check's process, :data:`TIMED_OUT` when it was ended. Its result is in its file. Nothing that
        it has started outlives it."""
        try:
            return self._run(check, limit)
        finally:
            self._sweep()

    def _run(self, check: str, limit: float) -> int:
        request = json.dumps({"check": check, "context": asdict(self._context), "log": str(self.log)})
        end = time.monotonic() + limit
        if self._warm:
            before = self.log.stat().st_size
            code = self._forked(request, end)
            if code == TIMED_OUT and not self._proved:  # a GPU may hang so
                self._leave_warm()
                return code
            if code is not None and not self._poisoned(before):
                self._proved = True
                return code
            self._leave_warm()
        return self._fresh(request, end)

    def _leave_warm(self) -> None:
        """From now on, each process from nothing."""
        self._warm = False
        self.close()

    def close(self) -> None:
        """End the process that is forked, and the check that is running where an interrupt has come between."""
        server, self._server = self._server, None
        if server is not None:
            _end(server.pid)
            server.wait()
        self._sweep()

    def _sweep(self) -> None:
        """End all that bears the mark, but for the process that is forked: the check itself, where it is not known to
        have ended, and what it has started, such as torchrun's workers, which lead sessions of their own."""
        if self._busy is not None:
            _end(self._busy)
            self._busy = None
        kept = None if self._server is None else self._server.pid
        for _ in range(20):  # one may be starting another meanwhile
            found = [pid for pid in _marked(self._mark) if pid != kept]
            if not found:
                return
            for pid in found:
                _end(pid)
            time.sleep(0.05)

    def _poisoned(self, since: int) -> bool:
        with self.log.open(errors="replace") as log:
            log.seek(since)
            return _POISONED.search(log.read()) is not None

    def _serve(self) -> None:
        with self.log.open("a") as log:
            self._server = subprocess.Popen(
                [sys.executable, str(self._tool), "--serve"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=self._environment, cwd=PROJECT, start_new_session=True,
            )  # fmt: skip
        threading.Thread(target=self._listen, args=(self._server,), daemon=True).start()

    def _listen(self, server: subprocess.Popen[str]) -> None:
        assert server.stdout is not None
        for line in server.stdout:
            self._answers.put(line.strip())
        self._answers.put("")  # it has ended

    def _answer(self, limit: float) -> str | None:
        """The next line; "" when there will be none, None when it takes too long."""
        end = time.monotonic() + limit
        while True:
            # A check that has lost its parent holds the other end of the pipe, so that this alone does not tell.
            dead = self._server is None or self._server.poll() is not None
            try:
                return self._answers.get(timeout=min(max(end - time.monotonic(), 0.0), 0.2))
            except queue.Empty:
                if dead:
                    return ""
                if time.monotonic() >= end:
                    return None

    def _forked(self, request: str, end: float) -> int | None:
        """None when the process that is forked has died."""
        assert self._server is not None and self._server.stdin is not None
        try:
            print(request, file=self._server.stdin, flush=True)
        except OSError:
            return None
        pid = self._answer(30.0)
        if not pid:
            return None
        self._busy = int(pid)
        code = self._answer(end - time.monotonic())
        if not code:  # it takes too long, or nobody is there to say what becomes of it
            self._sweep()
        self._busy = None
        if code is None:
            return TIMED_OUT if self._answer(30.0) else None
        return int(code) if code else None

    def _fresh(self, request: str, end: float) -> int:
        with self.log.open("a") as log:
            process = subprocess.Popen(
                [sys.executable, str(self._tool), "--worker", request],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=self._environment, cwd=PROJECT, start_new_session=True,
            )  # fmt: skip
        self._busy = process.pid
        try:
            code = process.wait(max(end - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            self._sweep()
            process.wait()
            code = TIMED_OUT
        self._busy = None
        return code


def _marked(mark: str) -> list[int]:
    """Processes with this in their environment. Linux only; elsewhere those of a check's own session have to do."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            if mark.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def _end(pid: int) -> None:
    """A process that leads a session, with all that it has started."""
    for kill in (os.killpg, os.kill):  # it may not lead one yet
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def exit_text(code: int) -> str:
    """What an exit code says."""
    names: Mapping[int, str] = {TIMED_OUT: "ended at its time limit", -signal.SIGSEGV: "segmentation fault"}
    return names.get(code, f"killed by signal {-code}" if code < 0 else f"exit code {code}")
