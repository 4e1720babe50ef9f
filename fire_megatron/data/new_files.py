"""Files that appear whole, together and at the end, and replace nothing unless told to."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO

from fire_megatron.config.errors import DataError


class NewFiles:
    """Text files written under temporary names beside their own.

    What is not published is gone when this is left; a write that failed leaves it as a DataError.
    """

    def __init__(self, *, overwrite: bool) -> None:
        """Args: overwrite: whether :meth:`publish` may replace files."""
        self.overwrite = overwrite
        self._open: dict[Path, IO[str]] = {}

    def check(self, path: Path, read: Iterable[Path]) -> None:
        """That a file may be made at a path.

        Args:
            path: where the file is to be.
            read: files that are read, none of which it may be.

        Raises:
            DataError: there is something that may not be replaced.
        """
        same = next((other for other in read if _same(path, other)), None)
        if same is not None:
            raise DataError(f"{path}: is also read from ({same}); write to another file")
        if path.is_dir():
            raise DataError(f"{path}: is a folder; name a file in it")
        if path.exists() and not self.overwrite:
            raise DataError(f"{path}: is there already; give another name, or --overwrite to replace it")

    def open(self, path: Path) -> IO[str]:
        """A stream for the file, UTF-8. Raises DataError when none can be made there."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stream = open(_temporary(path), "w", encoding="utf-8", newline="\n")  # noqa: SIM115  closed by publish
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror}); write somewhere else") from error
        self._open[path] = stream
        return stream

    def publish(self, path: Path) -> None:
        """Flush the file to the disk and give it its name. Raises DataError when something has come in its way."""
        self.check(path, ())
        stream = self._open[path]
        stream.flush()
        os.fsync(stream.fileno())
        stream.close()
        os.replace(_temporary(path), path)
        del self._open[path]

    def __enter__(self) -> NewFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for path, stream in self._open.items():
            with contextlib.suppress(OSError):  # a full disk, of which the write has told already
                stream.close()
            _temporary(path).unlink(missing_ok=True)
        self._open.clear()
        if isinstance(error, OSError):
            raise DataError(f"cannot write ({error.strerror}); make room, or write somewhere else") from error


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _same(path: Path, other: Path) -> bool:
    return path.resolve() == other.resolve() or (path.exists() and other.exists() and path.samefile(other))
