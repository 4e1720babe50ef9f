"""A folder for one process at a time, on whatever file system, and free again when that process is gone.

Locks of the kernel (``flock``) are known to one machine only on some network file systems, unknown to others, and may
outlive a node that has crashed. So a process puts its name into a file of the folder and changes the file every few
seconds. Another one that finds it there knows at once whether the process is alive where both are on one machine;
elsewhere it looks whether the file still changes. Clocks are not compared. Without torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fire_megatron.config.errors import UserError

LOCK = ".lock"
_BEAT = 2.0
"""Seconds between changes of the file."""
_PATIENCE = 20.0
"""Seconds without a change after which a process of another machine counts as gone."""
_DYING = 2.0
"""Seconds that a process of this machine may take from being killed to being gone."""
_SETTLING = 0.5
"""Seconds in which others that have found it gone at the same time have put in their names too."""
_LENGTH = 512
"""Bytes of the file, which is written at once and in place: network file systems may show an old file for a while after
a rename."""
EXIT_CODE = 3
"""Of a process whose folder another one has taken, since it had not changed the file for too long."""


@contextlib.contextmanager
def alone_in(folder: Path, problem: Callable[[str], UserError]) -> Iterator[None]:
    """Hold a folder, made when missing, against other processes.

    Args:
        folder: that this process is to write in.
        problem: from who holds it, in words, to the error to be raised.

    Raises:
        UserError: from ``problem``.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, own = folder / LOCK, _self()
    _take(path, own, problem)
    end = threading.Event()
    thread = threading.Thread(target=_hold, args=(path, own, end), name=f"holding {folder}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
        with contextlib.suppress(OSError):
            if _parsed(_read(path)).get("token") == own["token"]:
                path.unlink()


def _self() -> dict[str, Any]:
    """What this process writes into the file."""
    pid = os.getpid()
    place = {"host": socket.gethostname(), "space": _space(), "pid": pid, "born": _born(pid)}
    return {**place, "job": os.environ.get("SLURM_JOB_ID"), "token": secrets.token_hex(8), "beat": 0}


def _take(path: Path, own: dict[str, Any], problem: Callable[[str], UserError]) -> None:
    for _ in range(3):  # it may go while it is looked at
        with contextlib.suppress(FileExistsError):
            _write(path, own, os.O_CREAT | os.O_EXCL)
            return
        holder = _living_holder(path)
        if holder is not None:
            raise problem(_words(holder))
        if path.exists():
            _write(path, own)
            time.sleep(_SETTLING)
            break
    holder = _parsed(_read(path))
    if holder.get("token") != own["token"]:
        raise problem(_words(holder))


def _hold(path: Path, own: dict[str, Any], end: threading.Event) -> None:
    """Until the end, change the file every few seconds."""
    beat = 0
    while not end.wait(_BEAT):
        with contextlib.suppress(OSError):  # of a file system that hangs, or has no room
            holder = _parsed(_read(path))
            if holder.get("token", own["token"]) != own["token"]:
                text = f"error: {path.parent} was taken by {_words(holder)}, as if this process were gone: it leaves"
                print(text, file=sys.stderr, flush=True)
                os._exit(EXIT_CODE)
            beat += 1
            _write(path, own | {"beat": beat}, os.O_CREAT)


def _living_holder(path: Path) -> dict[str, Any] | None:
    """What the file says of a process that holds it and is alive; None where there is none."""
    first = _read(path)
    holder = _parsed(first)
    started = time.monotonic()
    if holder.get("space") and holder["space"] == _space():
        while holder.get("born") and _born(holder["pid"]) == holder["born"]:
            if time.monotonic() > started + _DYING:
                return holder
            time.sleep(0.1)
        return None
    if first:
        print(f"{path}: is of {_words(holder)}; waiting {_PATIENCE:.0f} s for a sign of life", flush=True)
    deadline = started + _PATIENCE
    while first and time.monotonic() < deadline:
        time.sleep(_BEAT / 4)
        now = _read(path)
        if now != first:
            return _parsed(now) if now else None
    return None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _write(path: Path, values: dict[str, Any], flags: int = 0) -> None:
    handle = os.open(path, os.O_WRONLY | flags, 0o644)
    try:
        os.pwrite(handle, json.dumps(values).encode().ljust(_LENGTH - 1) + b"\n", 0)
    finally:
        os.close(handle)


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _words(holder: dict[str, Any]) -> str:
    """``process 17 on node3 (Slurm job 5)``."""
    job = f" (Slurm job {holder['job']})" if holder.get("job") else ""
    return f"process {holder['pid']} on {holder.get('host')}{job}" if holder.get("pid") else "another process"


def _space() -> str | None:
    """What process ids are of: this start of this machine, and the container; None where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _born(pid: int) -> str | None:
    """When a process was started, in the kernel's words; None for one that is gone."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]
