"""What a model wrote, a line an answer, in files that can be killed and continued.

A folder holds ``settings.json``, which fixes the answers; ``parts/<benchmark>/<rank>.jsonl``, where each replica
appends what it has; and ``<benchmark>.jsonl``, into which the parts go once all answers are there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from fire_megatron.config.errors import DataError
from fire_megatron.platform.files import write_whole

SETTINGS = "settings.json"
SCORES = "scores.json"
PARTS = "parts"


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
    tokens: int
    """Tokens sampled, the stop token included."""
    truncated: bool
    """Whether the answer was cut at the longest allowed."""

    @property
    def key(self) -> tuple[int, int]:
        """What it is an answer to, and the how-manieth."""
        return self.problem, self.sample

    def line(self) -> str:
        """JSON, with its line break."""
        return json.dumps(asdict(self), ensure_ascii=False).encode("utf-8", "replace").decode() + "\n"


_FIELDS = {field.name for field in fields(Generation)}


def _parsed(line: str) -> Generation | None:
    """None for a line that was cut short."""
    try:
        values = json.loads(line) if line.endswith("\n") else None
    except ValueError:
        return None
    return Generation(**values) if isinstance(values, dict) and values.keys() == _FIELDS else None


def read_generations(folder: Path, name: str) -> dict[tuple[int, int], Generation]:
    """All answers to a benchmark that are there, of any number of ranks, by (problem, sample)."""
    found: dict[tuple[int, int], Generation] = {}
    for path in (folder / f"{name}.jsonl", *sorted((folder / PARTS / name).glob("*.jsonl"))):
        if path.exists():
            with path.open(encoding="utf-8", errors="replace", newline="\n") as stream:
                for generation in filter(None, map(_parsed, stream)):
                    found.setdefault(generation.key, generation)
    return found


class PartWriter:
    """Appends answers to this replica's part of a benchmark, each in one write."""

    def __init__(self, folder: Path, name: str, rank: int) -> None:
        """Raises DataError: the folder cannot be written."""
        path = folder / PARTS / name / f"{rank:05d}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _drop_cut_line(path)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise DataError(f"--out {folder}: cannot be written ({error}); choose another folder") from error

    def write(self, generation: Generation) -> None:
        """Append one; it is there for a rerun whatever happens to this process. Raises DataError: no space."""
        line = generation.line().encode()
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            raise DataError(f"--out: an answer cannot be written ({error}); make room and run again") from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _drop_cut_line(path: Path) -> None:
    """Cut a file back to its last line break."""
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder against other evaluations, which would lose answers to this one's merge. Let go of at the end of
    the process too, whatever ends it.

    Raises:
        DataError: another one is at work there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise DataError(f"--out {folder}: cannot be written ({error}); give another folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"--out {folder}: another evaluation writes there; wait for it, or give another") from None
        except OSError:
            pass  # a file system without locks
        yield
        (folder / ".lock").unlink(missing_ok=True)


def merge_parts(folder: Path, name: str) -> None:
    """Put all answers to a benchmark into one file, in order, and remove the parts."""
    generations = read_generations(folder, name)
    write_whole(folder / f"{name}.jsonl", (generations[key].line() for key in sorted(generations)))
    shutil.rmtree(folder / PARTS / name, ignore_errors=True)
    if (folder / PARTS).is_dir() and not any((folder / PARTS).iterdir()):
        (folder / PARTS).rmdir()


def require_settings(
    folder: Path, model: str, fingerprint: str, settings: Mapping[str, Any], benchmarks: Mapping[str, str]
) -> None:
    """Begin a folder, or see that what it holds was made in the same way.

    Args:
        folder: made when missing.
        model: what answers, for people.
        fingerprint: of its weights and tokenizer.
        settings: what else fixes the answers, by the option that sets it.
        benchmarks: digest of each by name; others may join those that are there.

    Raises:
        DataError: the folder was made with other settings, names the first, or it cannot be written.
    """
    path = folder / SETTINGS
    try:
        held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if held is None:
            held = {"model": model, "fingerprint": fingerprint, "benchmarks": {}, **settings}
        if not {"model", "fingerprint", "benchmarks"} <= held.keys():
            raise ValueError("no settings of an evaluation")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); choose another --out") from error
    if held["fingerprint"] != fingerprint:
        raise DataError(
            f"--checkpoint or --hf: {folder} holds answers of {held['model']}, and {model} has other weights or "
            "another tokenizer; restore it, or choose another --out"
        )
    for key, value in settings.items():
        if held.get(key) != value:
            raise DataError(
                f"--{key.replace('_', '-')}: {folder} holds answers made with {held.get(key)!r}, not {value!r}; "
                "restore it, or choose another --out"
            )
    for name, digest in benchmarks.items():
        if held["benchmarks"].get(name, digest) != digest:
            raise DataError(
                f"--benchmark {name}: {folder} holds answers to another file of this name; restore the file, rename it "
                "or choose another --out"
            )
    held["benchmarks"] |= benchmarks
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, [json.dumps(held, indent=2, sort_keys=True), "\n"])
    except OSError as error:
        raise DataError(f"--out {folder}: cannot be written ({error}); choose another folder") from error
