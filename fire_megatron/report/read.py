"""What a run's folder holds, read as far as it goes: a run in progress, or one of an older version, is read too."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from fire_megatron.config.checkpoints import read_json_object, read_marker
from fire_megatron.config.errors import RecipeError, UserError
from fire_megatron.config.yaml_text import parse_yaml
from fire_megatron.metrics.jsonl import METRICS_FILE, by_step, parsed
from fire_megatron.metrics.logger import RECIPE_FILE, SAMPLES_FILE

_STATUS_FILE = "status.json"  # train/status.py writes it; importing that would import torch
_STEP_FOLDER = re.compile(r"step_(\d+)")
_LATER_RECIPE = re.compile(r"recipe_from_(\d+)\.yaml")


@dataclass(frozen=True)
class SampleLines:
    """Lines of samples.jsonl, each parsed when its turn comes: the numbers of all tokens may take gigabytes."""

    path: Path
    offsets: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.offsets)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        if not self.offsets:
            return
        with self.path.open("rb") as stream:
            for offset in self.offsets:
                stream.seek(offset)
                values = parsed(stream.readline())
                if values is not None:  # as it was before the run was resumed
                    yield values


@dataclass(frozen=True)
class RunData:
    """A run, as its folder tells."""

    name: str
    """``run.name``, or the folder's."""
    folder: Path
    recipe_text: str
    """recipe.yaml; empty where there is none."""
    recipe_changes: tuple[tuple[int, str], ...]
    """Step after which the run was resumed with another recipe, and what differs from the one before (unified diff)."""
    recipe: Mapping[str, Any]
    """The latest recipe as plain values; empty where it cannot be read."""
    metrics: tuple[Mapping[str, Any], ...]
    """What metrics.jsonl tells of each step, in their order."""
    samples: SampleLines
    """Lines of samples.jsonl by step, as many as were asked for."""
    num_samples: int
    """All lines of samples.jsonl."""
    checkpoints: tuple[int, ...]
    """Steps whose checkpoints are complete."""
    state: str
    """What status.json says: ``running`` (also of a run that was killed), ``done``, ``stopped``, ``failed``; or ""."""
    error: str
    """Why it failed, or nothing."""
    notes: tuple[str, ...]
    """What could not be read."""

    @property
    def steps_done(self) -> int:
        """Steps that have been logged."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run, by its latest recipe."""
        steps = self._section("run").get("steps")
        return steps if type(steps) is int else None

    @property
    def teachers(self) -> tuple[str, ...]:
        """Teachers and mixtures, in the recipe's order; those that only metrics name come last."""
        found = dict.fromkeys(str(name) for name in self._section("teachers"))
        for line in self.metrics:
            found |= dict.fromkeys(key.split("/")[1] for key in line if key.startswith("teacher/"))
        return tuple(found)

    def _section(self, name: str) -> Mapping[str, Any]:
        section = self.recipe.get(name)
        return section if isinstance(section, dict) else {}


def read_run(directory: str | Path, *, max_samples: int, max_tokens: int) -> RunData:
    """Read a run's folder.

    Args:
        directory: the run's ``run.dir``.
        max_samples: lines of samples.jsonl to take; of more, those of steps spread evenly from first to last.
        max_tokens: that the responses of those lines may have together.

    Raises:
        UserError: no such folder, or not a run's.
    """
    folder = Path(directory)
    _require_run(folder)
    notes: list[str] = []
    text = _text(folder / RECIPE_FILE)
    recipe, changes = _recipes(folder, text, notes)
    metrics = by_step(_whole_lines(folder / METRICS_FILE, notes))
    samples, total = _samples(folder / SAMPLES_FILE, (max_samples, max_tokens), notes)
    section = recipe.get("run")
    status = read_json_object(folder / _STATUS_FILE) or {}
    return RunData(
        name=str(section.get("name", folder.name)) if isinstance(section, dict) else folder.resolve().name,
        folder=folder.resolve(),
        recipe_text=text,
        recipe_changes=changes,
        recipe=recipe,
        metrics=tuple(metrics),
        samples=samples,
        num_samples=total,
        checkpoints=_checkpoints(folder, recipe),
        state=str(status.get("state") or ""),
        error=str(status.get("error") or ""),
        notes=tuple(notes),
    )


def _is_run(folder: Path) -> bool:
    return (folder / METRICS_FILE).is_file() or (folder / RECIPE_FILE).is_file()


def _require_run(folder: Path) -> None:
    if not folder.is_dir():
        near = difflib.get_close_matches(folder.name, [p.name for p in _folders(folder.parent)], n=1)
        advice = f"did you mean {folder.parent / near[0]}?" if near else "give the run.dir of a run"
        raise UserError(f"{folder}: no such folder; {advice}")
    if not _is_run(folder):
        runs = [path for path in (folder.absolute().parent, *_folders(folder)) if _is_run(path)]
        advice = f"for example {runs[0]}" if runs else "the folder that the recipe names as run.dir"
        raise UserError(
            f"{folder}: not the folder of a run (neither {METRICS_FILE} nor {RECIPE_FILE} there); give one, {advice}"
        )


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _recipes(folder: Path, first: str, notes: list[str]) -> tuple[Mapping[str, Any], tuple[tuple[int, str], ...]]:
    """The latest recipe's values, and how each later recipe differs from the one before it."""
    later = sorted(
        (int(match[1]), path) for path in folder.glob("recipe_from_*.yaml") if (match := _LATER_RECIPE.match(path.name))
    )
    changes, before = [], first
    for step, path in later:
        now = _text(path)
        lines = difflib.unified_diff(before.splitlines(), now.splitlines(), lineterm="", n=1)
        changes.append((step, "\n".join(list(lines)[2:])))
        before = now
    try:
        values = parse_yaml(before, source=RECIPE_FILE)
    except RecipeError as error:
        notes.append(f"The recipe cannot be read: {error}")
        values = None
    return values if isinstance(values, dict) else {}, tuple(changes)


def _checkpoints(folder: Path, recipe: Mapping[str, Any]) -> tuple[int, ...]:
    section = recipe.get("checkpoint")
    named = section.get("dir") if isinstance(section, dict) else None
    parent = Path(named) if isinstance(named, str) else folder / "checkpoints"
    found = (
        int(match[1])
        for path in _folders(parent)
        if (match := _STEP_FOLDER.fullmatch(path.name)) and read_marker(path) is not None
    )
    return tuple(sorted(found))


def _whole_lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Objects with a step; a line that is still being written is passed over, one that is damaged is noted."""
    damaged = 0
    for _, line in _lines(path):
        values = parsed(line)
        if values is None:
            damaged += 1
        else:
            yield values
    if damaged:
        notes.append(f"{damaged} damaged line{'s' * (damaged > 1)} of {path.name} left out")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of each line that has an end."""
    if not path.is_file():
        return
    offset = 0
    with path.open("rb") as stream:
        for line in stream:
            if line.endswith(b"\n"):
                yield offset, line
            offset += len(line)


_STEP = re.compile(rb'\{"step": (\d+),')
_TOKENS = re.compile(rb'"tokens": (\d+),')
"""How the logger writes them, so that not all lines need be parsed; in texts quotes are escaped."""


def _head(line: bytes) -> tuple[int, int] | None:
    """Step and tokens of a line; none for a damaged one."""
    step, tokens = _STEP.match(line), _TOKENS.search(line)
    if step and tokens:
        return int(step[1]), int(tokens[1])
    values = parsed(line)
    if values is None:
        return None
    count = values.get("tokens")
    return values["step"], count if type(count) is int else 0


def _samples(path: Path, bounds: tuple[int, int], notes: list[str]) -> tuple[SampleLines, int]:
    """The chosen lines by step, and how many lines there are. Each chosen line is parsed, to see that it can be."""
    places: dict[int, list[tuple[int, int]]] = {}
    damaged = 0
    for offset, line in _lines(path):
        head = _head(line)
        if head is None:
            damaged += 1
        else:
            places.setdefault(head[0], []).append((offset, head[1]))
    chosen = []
    if places:
        with path.open("rb") as stream:
            for offset in _spread(places, *bounds):
                stream.seek(offset)
                whole = parsed(stream.readline()) is not None
                damaged += not whole
                chosen += [offset] if whole else []
    if damaged:
        notes.append(f"{damaged} damaged line{'s' * (damaged > 1)} of {path.name} left out")
    return SampleLines(path, tuple(chosen)), sum(map(len, places.values()))


def _spread(places: Mapping[int, list[tuple[int, int]]], most: int, most_tokens: int) -> list[int]:
    """Offsets of whole steps, evenly from the first to the last, that have at most so many lines and tokens together;
    where not even two steps fit, of the last one's first lines. ``places``: offset and tokens of each line by step."""
    steps = sorted(places)
    sizes = {step: (len(lines), sum(tokens for _, tokens in lines)) for step, lines in places.items()}

    def evenly(count: int) -> list[int]:
        return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]

    def fits(some: Sequence[int]) -> bool:
        lines, tokens = map(sum, zip(*(sizes[step] for step in some), strict=True))
        return lines <= most and tokens <= most_tokens

    if fits(steps):
        return [offset for step in steps for offset, _ in places[step]]
    low, high = 1, len(steps)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(evenly(middle)) else (low, middle)
    if low > 1:
        return [offset for step in evenly(low) for offset, _ in places[step]]
    last = places[steps[-1]][:most]
    sums = accumulate(tokens for _, tokens in last)
    return [offset for (offset, _), tokens in zip(last, sums, strict=True) if tokens <= most_tokens]
