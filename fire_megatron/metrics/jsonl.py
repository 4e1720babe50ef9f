"""JSON Lines that survive being killed and resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from fire_megatron.platform.files import write_whole

METRICS_FILE = "metrics.jsonl"


class JsonlFile:
    """Appends one object a line, each flushed, and on opening forgets what a resumed run is about to redo."""

    def __init__(self, path: Path, stays: Callable[[Mapping[str, Any]], bool]) -> None:
        """Open for appending.

        Args:
            path: the file; made when missing.
            stays: tells of each line, which has a ``step``, whether it stays as it is. The others are dropped, and so
                is a line that was cut short.
        """
        keep_lines(path, stays)
        self._stream: TextIO = path.open("a", encoding="utf-8")

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one object; numbers that are not finite become null."""
        self._stream.write(json.dumps(finite(values), ensure_ascii=False, allow_nan=False) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def by_step(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl``, what a step has measured and its evaluation in one; in the order of the steps."""
    steps: dict[int, dict[str, Any]] = {}
    for line in lines:
        steps.setdefault(line["step"], {}).update(line)
    return [steps[step] for step in sorted(steps)]


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that is whole."""
    return map(json.loads, path.read_text(encoding="utf-8").splitlines())


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All metrics of a run, a step each; see :func:`by_step`."""
    return by_step(read_lines(run_dir / METRICS_FILE))


def finite(value: Any) -> Any:
    """The value with None for every infinity and not-a-number in it."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parsed(line: str | bytes) -> dict[str, Any] | None:
    """A line's object; None where there is none, or one without a step."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and type(values.get("step")) is int else None


def replace_json(path: Path, value: Any) -> None:
    """Write a JSON file in one rename, so that a reader sees the old one or the new one."""
    write_whole(path, [json.dumps(finite(value), indent=2, ensure_ascii=False), "\n"])


def keep_lines(path: Path, stays: Callable[[Mapping[str, Any]], bool]) -> None:
    """Rewrite the file without the other lines, in one rename."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as stream:
        lines = list(stream)
    whole = [(line, parsed(line)) for line in lines if line.endswith("\n")]
    kept = [line for line, values in whole if values is not None and stays(values)]
    if len(kept) < len(lines):
        write_whole(path, kept)
