"""The state of a run, in ``status.json`` of its folder: for its next start, and for the user."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fire_megatron.config.errors import TrainingError
from fire_megatron.metrics.jsonl import replace_json
from fire_megatron.platform.launch import Restart

STATUS_FILE = "status.json"
_IN_VAIN = "not restarted, since it would fail again: "
State = Literal["running", "done", "stopped", "failed"]


@dataclass(frozen=True)
class RunStatus:
    """The last thing that the run's first rank said of it."""

    state: State
    """``running`` is also what a run says that has been killed."""
    step: int = 0
    """Steps completed when it was said."""
    saved: int | None = None
    """Newest checkpoint that is whole."""
    restarts: int = 0
    """Automatic restarts in a row without a new checkpoint."""
    progress: bool = True
    """Whether a checkpoint has been saved since the start."""
    error: str | None = None
    """Why it failed."""
    hopeless: bool = False
    """Whether the same start would fail again: a mistake of the user's, or numbers that are not finite."""
    time: float = 0.0
    """When, in seconds since 1970."""


def read_status(run_dir: Path) -> RunStatus | None:
    """What a run's folder says; None where there is nothing or nothing that can be read."""
    try:
        values: dict[str, Any] = json.loads((run_dir / STATUS_FILE).read_text(encoding="utf-8"))
        return RunStatus(**values)
    except (OSError, ValueError, TypeError):
        return None


def write_status(run_dir: Path, status: RunStatus) -> None:
    """Replace what the folder says, in one rename.

    Raises:
        OSError: the file system refuses.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    replace_json(run_dir / STATUS_FILE, asdict(replace(status, time=time.time())))


def note_failure(run_dir: Path, error: str, *, hopeless: bool) -> None:
    """Write that a run which is under way has failed. Does its best: the error itself is what matters."""
    status = read_status(run_dir)
    if status is not None and status.state == "running":
        with contextlib.suppress(OSError):
            write_status(run_dir, replace(status, state="failed", error=error, hopeless=hopeless))


def begin(run_dir: Path, *, saved: int | None, restart: Restart, max_restarts: int) -> RunStatus:
    """The status of a run that starts, not written yet.

    Args:
        run_dir: the run's folder.
        saved: step of the newest checkpoint.
        restart: how this process came to be started.
        max_restarts: ``run.max_restarts``.

    Raises:
        TrainingError: it has been restarted too often, or another restart would fail too.
    """
    before = read_status(run_dir)
    fresh = RunStatus("running", saved or 0, saved, progress=False)
    if restart is Restart.NO or before is None or before.state == "done":
        return fresh
    stopped = before.state == "stopped"
    if stopped and before.progress:
        return fresh
    if restart is Restart.LAUNCHER and before.state == "failed" and before.hopeless:
        raise TrainingError(f"{_IN_VAIN}{(before.error or '').removeprefix(_IN_VAIN)}")
    restarts = before.restarts + 1 if before.saved == saved else 1
    if restarts > max_restarts:
        where = "before its first checkpoint" if saved is None else f"after the checkpoint of step {saved}"
        last = f"last error: {before.error or 'none told, a process was killed'}"
        if stopped:
            last = (
                "the last time it was asked to stop before it had anything new to save: give it more time (the job's "
                "time limit), or let a step take less"
            )
        raise TrainingError(
            f"the run has {'failed or been stopped' if stopped else 'failed'} {restarts} times in a row {where} and "
            f"was restarted {restarts - 1} times (run.max_restarts={max_restarts}); {last}. Start it by hand to try "
            "again"
        )
    return replace(fresh, restarts=restarts)
