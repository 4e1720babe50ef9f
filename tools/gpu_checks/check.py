"""What a check is, what it is told, and what it says. Imports no torch."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]

OK, FAILED, LEFT_OUT, NEEDS_GPU = "ok", "FAILED", "left out", "needs a GPU"
Figure = float | int | str | bool | None
"""None is what could not be measured here."""


class NotHere(Exception):
    """A check cannot be made on this machine; the message says what is missing."""


def need(*packages: str) -> None:
    """Raise :class:`NotHere` unless all of these can be imported."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise NotHere(f"not installed: {', '.join(missing)}")


@dataclass(frozen=True)
class Check:
    """A row of the table."""

    name: str
    function: str
    """``file:function`` of this package."""
    figures: tuple[str, ...]
    """What it promises to say; a check that ends without one of them has failed."""
    seconds: float
    """What it may take on an H100, at a guess; it does not begin with less than that left of the budget."""
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    """Checks that must have passed before."""
    gpu: bool = False
    """Whether a CPU can say nothing of it."""

    @property
    def limit(self) -> float:
        """Seconds after which its process is ended: on a machine that is slower than thought it may take longer."""
        return 3 * self.seconds + 30


@dataclass(frozen=True)
class Findings:
    """What a check's function returns."""

    told: str
    """One line for people."""
    figures: Mapping[str, Figure]
    problems: Sequence[str] = ()
    """What is not as it must be; the check has failed if there is any."""


@dataclass(frozen=True)
class Result:
    """What became of a check."""

    check: str
    state: str
    seconds: float
    told: str
    figures: Mapping[str, Figure] = field(default_factory=dict)

    def line(self) -> str:
        """As it is printed."""
        return f"{self.state:11} {self.seconds:6.1f} s  {self.check}: {self.told}"


@dataclass(frozen=True)
class Context:
    """What a check is told of where it runs."""

    device: str
    """``cuda`` or ``cpu``."""
    work: str
    """Folder for models and runs."""
    results: str
    """Folder of the results so far, ``NAME.json``."""

    @property
    def gpu(self) -> bool:
        """Whether it is for a GPU."""
        return self.device == "cuda"

    @property
    def folder(self) -> Path:
        """Where models and runs go."""
        return Path(self.work)

    def path(self, check: str) -> Path:
        """Where a check leaves its result."""
        return Path(self.results) / f"{check}.json"

    def earlier(self, check: str) -> Mapping[str, Figure]:
        """Figures of a check that has passed before this one; empty when there are none."""
        path = self.path(check)
        return json.loads(path.read_text())["figures"] if path.is_file() else {}

    def leave(self, result: Result) -> None:
        """Keep a result, whole or not at all."""
        path = self.path(result.check)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(result)))
        temporary.replace(path)


def rounded(value: float | None, digits: int = 3) -> float | None:
    """To so many significant digits, which is all that a measurement has."""
    if value is None:
        return None
    number = float(f"{value:.{digits}g}")
    return int(number) if number.is_integer() and abs(number) >= 10 ** (digits - 1) else number


def said(value: float | None, unit: str = "") -> str:
    """A figure in a line for people."""
    return "not measured" if value is None else f"{value:g}{unit and ' ' + unit}"
