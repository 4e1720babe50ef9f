"""Typed access to a ``config.json``; every complaint names file, key and value. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fire_megatron.config.errors import CheckpointError


class Reader:
    """One mapping of a ``config.json``: the whole file, or a section of it."""

    def __init__(self, path: Path, values: Mapping[str, Any], where: str = "") -> None:
        """Args: values: of the mapping; where: what stands before its keys in messages, such as ``rope_scaling.``."""
        self.path, self.values, self.where = path, values, where

    def fail(self, message: str) -> CheckpointError:
        """An error that names the file."""
        return CheckpointError(f"{self.path}: {message}")

    def _value(self, key: str, otherwise: Any) -> Any:
        """``otherwise`` stands for an absent or null key, which is an error without it."""
        value = self.values.get(key)
        value = otherwise if value is None else value
        if value is None:
            raise self.fail(f"{self.where}{key} is missing; the file is incomplete, download it again")
        return value

    def integer(self, key: str, *, otherwise: int | None = None, least: int = 1) -> int:
        """A whole number of at least ``least``."""
        value = self._value(key, otherwise)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.fail(f"{self.where}{key} is {value!r}; it must be a whole number of at least {least}")
        return value

    def number(self, key: str, *, otherwise: float | None = None) -> float:
        """A positive number."""
        value = self._value(key, otherwise)
        if not _is_positive(value):
            raise self.fail(f"{self.where}{key} is {value!r}; it must be a number above 0")
        return float(value)

    def numbers(self, key: str, count: int) -> list[float]:
        """A list of so many positive numbers."""
        value = self._value(key, None)
        if not isinstance(value, list) or len(value) != count or not all(map(_is_positive, value)):
            raise self.fail(f"{self.where}{key} is {value!r}; it must be a list of {count} numbers above 0")
        return [float(number) for number in value]

    def flag(self, key: str, *, otherwise: bool = False) -> bool:
        """A boolean; ``otherwise`` stands for an absent or null key."""
        value = self.values.get(key)
        if value not in (None, True, False):
            raise self.fail(f"{self.where}{key} is {value!r}; it must be true or false")
        return otherwise if value is None else bool(value)

    def require(self, key: str, supported: Any) -> None:
        """Refuse a setting that changes the architecture in a way that is not implemented."""
        value = self.values.get(key)
        if value is not None and value != supported:
            raise self.fail(f"{self.where}{key} is {value!r}; only {supported!r} is supported")


def _is_positive(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 < value < float("inf")
