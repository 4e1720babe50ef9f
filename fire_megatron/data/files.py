"""Rows of prompt files: JSON Lines or one JSON list, plain or gzipped. A bad row is named, not fatal to its file."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fire_megatron.config.errors import DataError

_BOM = b"\xef\xbb\xbf"
_SHOWN = 60
"""Characters of a wrong value that a message repeats."""


def shown(value: object) -> str:
    """A value as a message repeats it: short, whatever was in the file."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """Place (``file:line``, or ``file: entry n`` of a JSON list, counted from 1) and object, or what is wrong there.

    Files are read as UTF-8, with or without a byte order mark; blank lines are passed over.

    Raises:
        DataError: a file that cannot be opened, or a JSON list that cannot be read as a whole.
    """
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            if plain.suffix == ".json":
                yield from _list_entries(path, file.read())
            else:
                yield from _lines(path, file)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); make the file again or correct the path") from error


def _lines(path: Path, file: Any) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    for number, line in enumerate(file, 1):
        content = line.removeprefix(_BOM) if number == 1 else line
        if content.strip():
            yield f"{path}:{number}", _parsed(content)


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
