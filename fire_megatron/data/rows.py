"""Rows of prompt files, whoever reads them: JSON Lines, one JSON list or CSV, plain or gzipped, or Parquet; and what a
row must be: its values by dotted keys, its text, chat and weights. A bad row is named, not fatal to its file."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from fire_megatron.config.errors import DataError
from fire_megatron.data import parquet

_BOM = b"\xef\xbb\xbf"
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_OTHERS = frozenset({".arrow", ".feather", ".xlsx", ".xls", ".zst", ".xz", ".bz2", ".zip", ".tar"})
_MANY = 10
_PASSED_ON = ("tool_calls", "tool_call_id", "name")
"""Keys of a message besides role and content that chat templates read."""
_SHOWN = 60
"""Characters of a wrong value that a message repeats."""


def shown(value: object) -> str:
    """A value as a message repeats it: short, whatever was in the file."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """Place (``file:line``, or ``file: entry n`` of a JSON list, counted from 1) and object, or what is wrong there.

    The file's ending says what it is; JSON Lines where it says nothing. CSV has a head, and all values are texts.
    Files are read as UTF-8, with or without a byte order mark; blank lines are passed over.

    Raises:
        DataError: a file that cannot be opened, or a JSON list that cannot be read as a whole; Parquet without pyarrow.
    """
    ending = path.suffix.lower()
    if ending in parquet.SUFFIXES:
        yield from parquet.read_parquet(path)
        return
    if ending in _OTHERS:
        raise DataError(f"{path}: {path.suffix} is not read; write it as JSON Lines, CSV or Parquet")
    opener = open
    if ending == ".gz":
        ending, opener = path.with_suffix("").suffix.lower(), gzip.open
    try:
        with opener(path, "rb") as file:
            if ending == ".json":
                yield from _list_entries(path, file.read())
            elif ending in _DELIMITERS:
                yield from _csv_rows(path, file, _DELIMITERS[ending])
            else:
                yield from _lines(path, file)
    except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); make the file again or correct the path") from error


def _lines(path: Path, file: Any) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    for number, line in enumerate(file, 1):
        content = line.removeprefix(_BOM) if number == 1 else line
        if content.strip():
            yield f"{path}:{number}", _parsed(content)


def _csv_rows(path: Path, file: Any, delimiter: str) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    for row in reader:
        place, heads = f"{path}:{reader.line_num}", reader.fieldnames or ()
        if None in row or None in row.values():
            count = len(heads) + len(row[None]) if None in row else sum(value is not None for value in row.values())
            yield (
                place,
                DataError(f"{count} values under {len(heads)} heads; put quotes around texts with {delimiter!r}"),
            )
        else:
            yield place, {head: value for head, value in row.items() if value != ""}


def _parsed(line: bytes) -> dict[str, Any] | DataError:
    try:
        return _object(json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return DataError(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8")
    except json.JSONDecodeError as error:
        return DataError(f"not valid JSON ({error.msg}, column {error.colno}); write one object a line")
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        return DataError(f"not JSON that can be read ({error}); remove the row")


def _object(row: Any) -> dict[str, Any] | DataError:
    return row if isinstance(row, dict) else DataError(f"{shown(row)} is not a JSON object such as {{...}}")


def _list_entries(path: Path, content: bytes) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    try:
        rows = json.loads(content.removeprefix(_BOM).decode("utf-8"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        advice = "; for one object a line name the file .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{path}:{error.lineno}: not valid JSON ({error.msg}, column {error.colno}){advice}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON that can be read ({error})") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: a .json file of prompts is a list of objects; for one object a line name it .jsonl")
    for number, row in enumerate(rows, 1):
        yield f"{path}: entry {number}", _object(row)


class Reason(StrEnum):
    """Why a row cannot be used, in the order of the checks."""

    INVALID_JSON = "invalid JSON"
    NO_PROMPT = "no prompt"
    NOT_TEXT = "not text"
    EMPTY = "empty"
    HALF_SURROGATE = "half a surrogate"
    ENDS_WITH_ASSISTANT = "ends with assistant"
    NO_LABEL = "no label"
    UNKNOWN_LABEL = "unknown label"
    DUPLICATE = "duplicate"
    DUPLICATE_OTHER_LABEL = "duplicate with another label"
    CONTAMINATED = "contaminated"
    TOKENIZER_REFUSES = "tokenizer refuses"
    TOO_LONG = "too long"


class RowError(DataError):
    """A row that cannot be used."""

    def __init__(self, reason: Reason, text: str) -> None:
        """Args: reason: the kind of mistake; text: what is there and what to do about it."""
        super().__init__(text)
        self.reason = reason


def lookup(row: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted path, or at a key that itself holds dots; None where there is none."""
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def look_like_answers(values: Sequence[Any]) -> bool:
    """Whether values are rather the right answers of rows than labels of teachers, which are few words: numbers, or
    nearly all different."""
    found = [value for value in values if isinstance(value, (str, int, float))]
    numbers = sum(re.fullmatch(r"\s*[-+$]*[\d.,/]+%?\s*", str(value)) is not None for value in found)
    return bool(found) and (2 * numbers > len(found) or (len(found) >= _MANY and 2 * len(set(found)) > len(found)))


def checked_text(value: Any, key: str, *, may_be_empty: bool = False) -> str:
    """The value as text that can be tokenized. Raises RowError."""
    if not isinstance(value, str):
        advice = "; a chat belongs under data.messages_key" if isinstance(value, list) else "; write a text there"
        raise RowError(Reason.NOT_TEXT, f"{key!r} is {shown(value)}, not a text{advice}")
    if not may_be_empty and not value.strip():
        raise RowError(Reason.EMPTY, f"{key!r} is empty; write a prompt there, or remove the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            Reason.HALF_SURROGATE, f"{key!r} holds half a surrogate pair ({value[error.start]!a}); repair the text"
        ) from error
    return value


def as_chat(value: Any) -> Any:
    """The messages that a text writes as JSON; any other value as it is."""
    if not isinstance(value, str) or not re.match(r"\s*\[\s*\{", value):
        return value
    try:
        messages = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return messages if all(isinstance(m, dict) and "role" in m for m in messages) else value


def _content(message: Mapping[str, Any], key: str) -> Any:
    """The text of a message: parts of text joined, nothing beside calls of tools."""
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    if not isinstance(content, list) or not content:
        return content
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise RowError(
                Reason.NOT_TEXT,
                f"'{key}[{number}]' is {shown(content[number])}; only parts of text can be read, as "
                '{"type": "text", "text": ...}',
            )
    return "".join(texts)


def checked_chat(messages: Any, key: str) -> list[dict[str, Any]]:
    """Messages whose last one a student can answer, reduced to role, content as a text, and what belongs to calls of
    tools. Raises RowError."""
    messages = as_chat(messages)
    if not isinstance(messages, list):
        raise RowError(
            Reason.NOT_TEXT, f"{key!r} is {shown(messages)}; write a list of {{role, content}} messages there"
        )
    if not messages:
        raise RowError(Reason.EMPTY, f"{key!r} is []; write a list of {{role, content}} messages there")
    chat = []
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if not isinstance(role, str) or not role:
            raise RowError(Reason.NOT_TEXT, f"'{key}[{number}]' is {shown(message)}; write {{role, content}} there")
        last, at = number == len(messages) - 1, f"{key}[{number}].content"
        content = checked_text(_content(message, at), at, may_be_empty=not last or role == "assistant")
        more = {name: message[name] for name in _PASSED_ON if message.get(name)}
        chat.append({"role": role, "content": content, **more})
    if chat[-1]["role"] == "assistant":
        raise RowError(
            Reason.ENDS_WITH_ASSISTANT,
            f"{key!r} ends with the assistant's message; remove it, since the student is to write it",
        )
    return chat


def row_messages(row: Mapping[str, Any], keys: Sequence[str]) -> list[dict[str, Any]]:
    """The chat under the first of the keys that the row has, where a text is one message of the user's.

    Raises:
        RowError: what is wrong with it, or none of the keys.
    """
    for key in keys:
        value = as_chat(present(row, key))
        if isinstance(value, list):
            return checked_chat(value, key)
        if value is not None:
            return [{"role": "user", "content": checked_text(value, key)}]
    raise RowError(Reason.NO_PROMPT, f"nothing under {' or '.join(map(repr, keys))}")


def present(row: Mapping[str, Any], key: str) -> Any:
    """:func:`lookup`, with None also for pandas' mark of a missing value."""
    value = lookup(row, key)
    return None if isinstance(value, float) and math.isnan(value) else value


def check_weights(weights: Mapping[Any, Any], key: str) -> None:
    """Weights of several labels are numbers of at least 0 and not all 0. Raises RowError."""
    for label, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise RowError(
                Reason.UNKNOWN_LABEL,
                f"'{key}.{label}' is {shown(weight)}; a label's weight is a number of at least 0",
            )
    if not 0 < sum(weights.values()) < math.inf:
        raise RowError(Reason.UNKNOWN_LABEL, f"{key!r} is {shown(weights)}; at least one label needs a weight above 0")
