"""What a model wrote, a line an answer: in memory, or in files that survive being killed and are continued.

A folder of the latter holds ``settings.json``, which fixes the answers; ``parts/<benchmark>/<rank>.jsonl``, where each
replica appends what it has; and ``<benchmark>.jsonl``, into which the parts go once all answers are there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from fire_megatron.config.checkpoints import read_json_object
from fire_megatron.config.errors import DataError
from fire_megatron.platform.files import write_whole
from fire_megatron.platform.folder_lock import alone_in

SETTINGS = "settings.json"
SCORES = "scores.json"
PARTS = "parts"
Key = tuple[int, int]
"""(problem, sample) of an answer to a benchmark, each from 0."""


@dataclass(frozen=True, order=True)
class Generation:
    """One answer to one problem."""

    problem: int
    """Place in the benchmark, from 0."""
    sample: int
    """Which of the problem's answers, from 0."""
    seed: int
    """With benchmark, problem and sample it fixes the random numbers."""
    text: str
    answer: str | None
    """Content of the last box; None without one."""
    right: str
    """The right answer."""
    correct: bool
    math_verify: bool
    """Whether math-verify, by its defaults, finds the right answer in the text."""
    tokens: int
    """Tokens sampled, the stop token included."""
    truncated: bool
    """Whether the answer was cut at the longest allowed."""

    @property
    def key(self) -> Key:
        """Which answer to which problem."""
        return self.problem, self.sample

    def line(self) -> str:
        """JSON, with its line break."""
        return json.dumps(asdict(self), ensure_ascii=False).encode("utf-8", "replace").decode() + "\n"


@contextlib.contextmanager
def writing(folder: Path, key: str = "--out") -> Iterator[None]:
    """Raises DataError: the folder, which this setting names, cannot be written."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{key} {folder}: cannot be written ({error}); make room and run again, or give another folder"
        ) from error


_FIELDS = {field.name for field in fields(Generation)}


def _parsed(line: str) -> Generation | None:
    """None for a line that was cut short."""
    try:
        values = json.loads(line) if line.endswith("\n") else None
    except ValueError:
        return None
    return Generation(**values) if isinstance(values, dict) and values.keys() == _FIELDS else None


def read_generations(folder: Path, name: str) -> dict[Key, Generation]:
    """All answers to a benchmark that are there, of any number of ranks."""
    found: dict[Key, Generation] = {}
    for path in (folder / f"{name}.jsonl", *sorted((folder / PARTS / name).glob("*.jsonl"))):
        if path.exists():
            with path.open(encoding="utf-8", errors="replace", newline="\n") as stream:
                for generation in filter(None, map(_parsed, stream)):
                    found.setdefault(generation.key, generation)
    return found


class MemoryAnswers:
    """Answers of this rank's replica, by benchmark."""

    def __init__(self) -> None:
        self._held: defaultdict[str, dict[Key, Generation]] = defaultdict(dict)

    def add(self, name: str, generation: Generation) -> None:
        """Keep an answer to a benchmark."""
        self._held[name][generation.key] = generation

    def held(self, name: str) -> dict[Key, Generation]:
        """The answers to a benchmark."""
        return self._held[name]


class PartFiles:
    """Answers in files that outlive the process: this replica's part of each benchmark, to which it appends."""

    def __init__(self, folder: Path, rank: int, written: Callable[[], object] = lambda: None) -> None:
        """Args: written: called after each answer."""
        self.folder, self.rank, self._written = folder, rank, written
        self._files: dict[str, int] = {}

    def add(self, name: str, generation: Generation) -> None:
        """Append an answer to a benchmark in one write; it is there for a rerun whatever happens to this process.

        Raises:
            DataError: the folder cannot be written, or has no space.
        """
        line = generation.line().encode()
        with writing(self.folder):
            if name not in self._files:
                path = self.folder / PARTS / name / f"{self.rank:05d}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                _drop_cut_line(path)
                self._files[name] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            while line:
                line = line[os.write(self._files[name], line) :]
        self._written()

    def held(self, name: str) -> dict[Key, Generation]:
        """On rank 0 all answers to a benchmark that are in the folder, of any rank; nothing on the others."""
        return read_generations(self.folder, name) if self.rank == 0 else {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.popitem()[1])


def _drop_cut_line(path: Path) -> None:
    """Cut a file back to its last line break."""
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder against other evaluations, which would lose answers to this one's merge.

    Raises:
        DataError: another evaluation is running there, or the folder cannot be written.
    """

    def problem(holder: str) -> DataError:
        return DataError(f"--out {folder}: {holder} writes there; wait for it, or give another")

    with ExitStack() as held:
        with writing(folder):
            held.enter_context(alone_in(folder, problem))
        yield


def write_answers(folder: Path, key: str, name: str, generations: Mapping[Key, Generation]) -> None:
    """Put all answers to a benchmark into one file, in order, and remove what parts of it there are.

    Raises:
        DataError: the folder, which the setting ``key`` names, cannot be written.
    """
    with writing(folder, key):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"{name}.jsonl", (generations[place].line() for place in sorted(generations)))
    shutil.rmtree(folder / PARTS / name, ignore_errors=True)
    with contextlib.suppress(OSError):  # while those of other benchmarks are there
        (folder / PARTS).rmdir()


def write_scores(folder: Path, key: str, report: Mapping[str, Any]) -> None:
    """Write ``scores.json``. Raises DataError: see :func:`write_answers`."""
    with writing(folder, key):
        write_whole(folder / SCORES, [json.dumps(report, indent=2), "\n"])


def begun_at(folder: Path) -> datetime:
    """When the evaluation that a folder holds was begun, as it says; the present for a new one."""
    values = read_json_object(folder / SETTINGS) or {}
    try:
        return datetime.fromisoformat(values["begun"])
    except (KeyError, TypeError, ValueError):
        return datetime.now()


def require_settings(
    folder: Path,
    model: str,
    fingerprint: str,
    settings: Mapping[str, Any],
    benchmarks: Mapping[str, str],
    begun: datetime | None = None,
) -> None:
    """Begin a folder, or see that what it holds was made in the same way.

    Args:
        folder: made when missing.
        model: what answers, for people.
        fingerprint: of its weights and tokenizer.
        settings: what else fixes the answers, by the option that sets it.
        benchmarks: digest of each by name; others may join those that are there.
        begun: when a new evaluation was begun: what chat templates are told of the time.

    Raises:
        DataError: the folder was made with other settings, names the first, or it cannot be written.
    """
    path, made = folder / SETTINGS, {"model": model, "fingerprint": fingerprint, "benchmarks": {}, **settings}
    made["begun"] = (begun or datetime.now()).isoformat()
    try:
        held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else made
        if not {"model", "fingerprint", "benchmarks"} <= held.keys():
            raise ValueError("no settings of an evaluation")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); choose another --out") from error
    other = []
    if held["fingerprint"] != fingerprint:
        what = f"of {held['model']}, and {model} has other weights or another tokenizer; restore it"
        other.append(("checkpoint or --hf", what))
    for key, value in settings.items():
        if held.get(key) != value:
            other.append((key.replace("_", "-"), f"made with {held.get(key)!r}, not {value!r}; restore it"))
    for name, digest in benchmarks.items():
        if held["benchmarks"].get(name, digest) != digest:
            other.append((f"benchmark {name}", "to another file of this name; restore the file, rename it"))
    for option, what in other:
        raise DataError(f"--{option}: {folder} holds answers {what}, or choose another --out")
    held["benchmarks"] |= benchmarks
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, [json.dumps(held, indent=2, sort_keys=True), "\n"])
