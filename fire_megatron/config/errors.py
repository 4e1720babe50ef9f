"""Errors that the user can fix: each message names the key, the value and the fix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar


class UserError(ValueError):
    """Something in the recipe, data, checkpoint or layout that the user can put right."""

    everywhere = False
    """Whether every rank raises the same, so that one of them is enough to tell it."""
    passing = False
    """Whether the same may go well when it is tried again."""


Error = TypeVar("Error", bound=UserError)


def on_every_rank(error: Error) -> Error:
    """An error that every rank is about to raise alike."""
    error.everywhere = True
    return error


class RecipeError(UserError):
    """A recipe key or value is wrong."""


class DataError(UserError):
    """A prompt file or tokenizer is wrong."""


class CheckpointError(UserError):
    """A checkpoint is missing, cut short, or not what the recipe says."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint is not what was written: cut short, or other bytes. An earlier one may serve."""


class TrainingError(UserError):
    """The run itself cannot go on, such as after a loss that is not finite."""


class LayoutError(UserError):
    """The parallel layout or the launcher does not fit the models or the machine."""


@dataclass(frozen=True)
class RecipeProblem:
    """One thing wrong with a recipe."""

    key: str
    """The dotted key, such as ``teachers.math.parallel.tensor``; relative to a section while that is being built."""
    text: str
    """What is wrong and what to do about it."""
    near: str | None = None
    """The key that was probably meant, as far from the root as ``key``."""

    def under(self, prefix: str) -> RecipeProblem:
        """The same problem, seen from the section that holds this one at ``prefix``."""
        near = None if self.near is None else join_key(prefix, self.near)
        return replace(self, key=join_key(prefix, self.key), near=near)

    def __str__(self) -> str:
        text = f"{self.text}; did you mean {self.near}?" if self.near else self.text
        return f"{self.key}: {text}" if self.key else text


class RecipeProblems(RecipeError):
    """Everything found wrong with a recipe in one pass, so that it takes one edit to fix."""

    def __init__(self, problems: Iterable[RecipeProblem], source: str = "") -> None:
        """Args: problems: at least one; source: the recipe file, named at the start of the message."""
        self.problems = tuple(problems)
        assert self.problems, "an error without a problem"
        prefix = f"{source}: " if source else ""
        if len(self.problems) == 1:
            message = f"{prefix}{self.problems[0]}"
        else:
            lines = "".join(f"\n  - {problem}" for problem in self.problems)
            message = f"{prefix}{len(self.problems)} problems in the recipe:{lines}"
        super().__init__(message)


def join_key(prefix: str, key: str) -> str:
    """``a.b`` and ``c`` -> ``a.b.c``; either may be empty."""
    return f"{prefix}.{key}" if prefix and key else prefix or key
