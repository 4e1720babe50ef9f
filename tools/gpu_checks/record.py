"""What the figures rest on, and the files that hold them."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from gpu_checks.check import PROJECT, Result

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "trl")


def about(command: str, commit: str | None) -> dict[str, str | None]:
    """Versions, date, command and commit; None for what is not there.

    Args:
        command: as it was given.
        commit: of the checkout; None asks git.
    """
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        versions[name] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {
        "date": now,
        "commit": commit or _commit(),
        "command": command,
        "card": None,
        "driver": None,
        "python": platform.python_version(),
        **versions,
    }


def _commit() -> str | None:
    git = ["git", "-C", str(PROJECT)]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
        return done.stdout.strip() + (" with changes" if changed.stdout.strip() else "")
    return None


def markdown(about: Mapping[str, str | None], results: Sequence[Result]) -> str:
    """For docs/gpu.md."""
    facts = [f"{key} {value}" for key, value in about.items() if value is not None and key != "command"]
    lines = [", ".join(facts) + f", `{about['command']}`", "", "| check | state | s | result |", "|---|---|---|---|"]
    for result in results:
        lines.append(f"| {result.check} | {result.state} | {result.seconds:g} | {result.told.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def write(out: Path, about: Mapping[str, str | None], results: Sequence[Result]) -> None:
    """``results.json`` and ``results.md``, each whole at any time."""
    values = {"about": dict(about), "checks": [asdict(result) for result in results]}
    for name, text in (("results.json", json.dumps(values, indent=1) + "\n"), ("results.md", markdown(about, results))):
        temporary = out / f".{name}"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(out / name)
