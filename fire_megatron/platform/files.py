"""Files and folders that are there whole or not at all. Without torch, so that commands on files start at once."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from fire_megatron.config.errors import CheckpointError, DataError


def write_whole(target: Path, parts: Iterable[str]) -> None:
    """Write UTF-8 text beside its place and rename it there, flushed to the disk; an existing file keeps its mode.

    Raises:
        OSError: the file cannot be written; what was there before is as it was.
    """
    mode = target.stat().st_mode & 0o777 if target.exists() else 0o644
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", text=True)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.writelines(parts)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON and flush it to the disk."""
    with path.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=2, sort_keys=True)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below and including ``folder`` to the disk."""
    for root, _, names in os.walk(folder):
        for path in (*(os.path.join(root, name) for name in names), root):
            _fsync(path)


def _fsync(path: str | Path) -> None:
    """Flush a file, or a folder's own entries, so that a rename inside it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_folder(folder: Path) -> None:
    """Delete a folder that may be complete: renamed first, so that a part of it is never taken for the whole."""
    if folder.exists():
        doomed = folder.with_name(f".gone_{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``target`` to fill, then rename it to ``target``; on any error remove it.

    Raises:
        CheckpointError: the file system refuses (no space, no permission).
    """
    target = target.absolute()
    temporary = target.with_name(f".tmp_{target.name}_{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        fsync_tree(temporary)
        swap_in(temporary, target)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def swap_in(temporary: Path, target: Path) -> None:
    """Rename a finished folder to its place. What stood there is set aside first and deleted last, so that a kill in
    between leaves it at :func:`aside`, and one that such a kill left there stays until the new one is in place."""
    if target.exists():
        shutil.rmtree(aside(target), ignore_errors=True)
        target.rename(aside(target))
    temporary.rename(target)
    _fsync(target.parent)
    shutil.rmtree(aside(target), ignore_errors=True)


def aside(target: Path) -> Path:
    """Where a folder is while another takes its place."""
    return target.with_name(f".old_{target.name}")


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
