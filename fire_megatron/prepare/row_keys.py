"""Files of rows in any of the formats that are read, and which keys of theirs hold prompt, label and answer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fire_megatron.config.errors import DataError
from fire_megatron.data.parquet import SUFFIXES, column_names, read_parquet
from fire_megatron.data.rows import as_chat, look_like_answers, lookup, read_rows, shown

LOOKED_AT = 1000
"""Rows of a file from which its keys are chosen."""


def _is_label(value: Any) -> bool:
    return isinstance(value, (str, Mapping)) and bool(value)


def _is_answer(value: Any) -> bool:
    return value is not None


@dataclass(frozen=True)
class _Sought:
    """What keys are looked for."""

    candidates: tuple[str, ...]
    """Keys tried in this order when the user names none."""
    fits: Callable[[Any], bool]
    """Whether a value found at a candidate can be meant."""


TEXT = _Sought(("problem", "question", "query", "prompt"), lambda value: isinstance(value, str))
CHAT = _Sought(("messages", "prompt"), lambda value: isinstance(as_chat(value), list))
# The teacher that verl's and G-OPD's rows name comes first: `label` is the answer in some data sets.
LABEL = _Sought(("extra_info.opd_teacher", "opd_teacher", "label"), _is_label)
ANSWER = _Sought(("answer", "reward_model.ground_truth", "ground_truth", "expected_answer", "final_answer"), _is_answer)


@dataclass(frozen=True)
class RowKeys:
    """Dotted keys of one file's rows."""

    prompt: tuple[str, ...]
    """Text or chat; the first that a row has is taken."""
    label: str | None = None
    answer: str | None = None

    @property
    def named(self) -> dict[str, str]:
        """By what they hold, for people."""
        held = {"prompt": " or ".join(self.prompt), "label": self.label, "answer": self.answer}
        return {name: key for name, key in held.items() if key}

    @property
    def all(self) -> tuple[str, ...]:
        """Every key."""
        return (*self.prompt, *(key for key in (self.label, self.answer) if key))


def open_rows(path: Path, keys: Sequence[str]) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """Place and row, or what is wrong with it; of Parquet only the columns that hold ``keys`` are read.

    Raises:
        DataError: a file that cannot be read.
    """
    if path.suffix in SUFFIXES:
        return read_parquet(path, {name for key in keys for name in (key, key.split(".")[0])})
    return read_rows(path)


@dataclass(frozen=True)
class KeyChoice:
    """Keys that the user named; None leaves one to be found."""

    prompt: str | None = None
    messages: str | None = None
    label: str | None = None
    answer: str | None = None
    wants_label: bool = True
    """False where every row gets the same label."""
    prompt_option: str = "--prompt-key"
    """The option that names ``prompt``."""

    def of(self, path: Path) -> RowKeys:
        """The keys of a file, from its first rows.

        Raises:
            DataError: a key that none of them has, or no prompt or label found in them.
        """
        named = {self.prompt_option: self.prompt, "--messages-key": self.messages}
        named |= {"--label-key": self.label, "--answer-key": self.answer}
        candidates = (key for sought in (TEXT, CHAT, LABEL, ANSWER) for key in sought.candidates)
        looked_for = [*candidates, *(key for key in named.values() if key)]
        rows = [r for _, r in itertools.islice(open_rows(path, looked_for), LOOKED_AT) if isinstance(r, dict)]
        own_prompt = tuple(key for key in (self.prompt, self.messages) if key)
        if not rows:  # an empty file, or one whose rows are rejected whatever the keys
            return RowKeys(own_prompt or ("problem", "messages"), self.label, self.answer)
        for option, key in named.items():
            if key and not any(_has(row, key) for row in rows):
                raise DataError(f"{path}: {option} {key}: {_nobody(path, rows)}")
        prompt = own_prompt or tuple(dict.fromkeys(key for sought in (TEXT, CHAT) if (key := _found(sought, rows))))
        if not prompt:
            raise DataError(
                f"{path}: no prompt under any of {', '.join(dict.fromkeys(TEXT.candidates + CHAT.candidates))}; "
                f"{_nobody(path, rows)}; name the key with {self.prompt_option}"
            )
        label = (self.label or _found(LABEL, rows)) if self.wants_label else None
        values = [lookup(row, label) for row in rows] if label and not self.label else []
        if look_like_answers(values):
            raise DataError(
                f"{path}: what is under {label!r} looks like answers, not labels (such as {shown(values[0])}); give "
                f"every row a label with --label, or name the key of the labels with --label-key (also if it is "
                f"{label})"
            )
        if self.wants_label and not label:
            raise DataError(
                f"{path}: no label under any of {', '.join(LABEL.candidates)}; {_nobody(path, rows)}; name the key "
                f"with --label-key, or give every row a label with --label"
            )
        return RowKeys(prompt, label, self.answer or _found(ANSWER, rows))


def _found(sought: _Sought, rows: Sequence[Mapping[str, Any]]) -> str | None:
    return next((key for key in sought.candidates if any(sought.fits(lookup(row, key)) for row in rows)), None)


_ABSENT = object()


def _has(row: Mapping[str, Any], key: str) -> bool:
    """Whether the path is there, if only with a null."""
    parent, _, last = key.rpartition(".")
    holder = lookup(row, parent) if parent else row
    return key in row or (isinstance(holder, Mapping) and holder.get(last, _ABSENT) is not _ABSENT)


def _nobody(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    columns = path.suffix in SUFFIXES
    names = (
        f"the columns are {', '.join(column_names(path))}"
        if columns
        else f"the first one's keys are {', '.join(rows[0])}"
    )
    return f"none of the first {len(rows)} rows has it; {names}"
