"""Python processes that tests start: alone or as ranks, with one thread each, and this project on their path."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ("-m", "fire_megatron.train", "--recipe")


def environment(*folders: Path, **variables: object) -> dict[str, str]:
    """This process's, with these variables, and these folders before the project's on the path."""
    path = os.pathsep.join(map(str, (*folders, ROOT, ROOT / "tests")))
    own = {name: str(value) for name, value in variables.items()}
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **own}


def command(*words: object, ranks: int = 1) -> list[str]:
    """Of a script (or ``-m`` and a module) and its arguments; of several ranks by way of torchrun."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks) if ranks > 1 else ()
    return [sys.executable, *map(str, (*launcher, *words))]


def call(
    *words: object, ranks: int = 1, code: int = 0, timeout: float = 300, read: str | None = None, **options: Any
) -> str:
    """What a process prints; its exit code must be ``code``.

    Args:
        words: see :func:`command`.
        read: text that it reads.
        options: of ``subprocess.Popen``. Errors are not among what is returned unless ``stderr`` says so.
    """
    pipe = subprocess.PIPE
    options = {"env": environment(), "cwd": ROOT, "stdin": pipe, "stdout": pipe, "stderr": pipe, **options}
    with subprocess.Popen(command(*words, ranks=ranks), text=True, **options) as process:
        try:
            out, err = process.communicate(read, timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # upon which torchrun ends its ranks as well
            raise
    assert process.returncode == code, out[-3000:] + (err or "")[-6000:]
    return out


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]
