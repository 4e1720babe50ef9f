"""Checksums of what lies in a folder of weights, taken of the bytes as they are written, compared as they are read.

CRC-32, which finds every error of up to 32 bits in a row and is as fast as a disk: it is against damage, not against
malice. A folder from elsewhere, such as megatron-core's own, has none and is read without.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fire_megatron.config.errors import CheckpointError, DamagedCheckpoint

CHECKSUMS = "checksums.json"
_BLOCK = 2**20


class Counting:
    """A file to write to, which knows the checksum of what has been written ."""

    def __init__(self, stream: BinaryIO) -> None:
        """Args: stream: opened for writing."""
        self.stream, self.name = stream, stream.name
        self.checksum = 0

    def write(self, data: Any) -> int:
        """Pass ``data`` on."""
        self.checksum = zlib.crc32(data, self.checksum)
        return self.stream.write(data)

    def flush(self) -> None:
        """Pass what is buffered on."""
        self.stream.flush()


def of_file(path: Path, *, start: int = 0, length: int | None = None) -> int:
    """Checksum of ``length`` bytes from ``start`` on; None is to the end.

    Raises:
        OSError: the file cannot be read, or ends before.
    """
    checksum, left = 0, length
    with path.open("rb") as stream:
        stream.seek(start)
        while left is None or left > 0:
            block = stream.read(_BLOCK if left is None else min(_BLOCK, left))
            if not block:
                break
            checksum = zlib.crc32(block, checksum)
            left = None if left is None else left - len(block)
    if left:
        raise OSError(f"{path}: ends {left} bytes too soon")
    return checksum


class Checksums:
    """What should be in a folder."""

    def __init__(self, chunks: Mapping[str, Mapping[str, int]], files: Mapping[str, int]) -> None:
        """Args: chunks: by file name, by position of the chunk's first byte in decimal; files: of whole files."""
        self._chunks, self._files = chunks, files

    @classmethod
    def read(cls, folder: Path) -> Checksums:
        """Those of a folder; of none, where it has none.

        Raises:
            DamagedCheckpoint: they cannot be read.
        """
        path = folder / CHECKSUMS
        if not path.exists():
            return cls({}, {})
        with reading(f"{path}:"):
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(values["chunks"], values["files"])

    def save(self, folder: Path) -> None:
        """Write them to a folder.

        Raises:
            OSError: the file system refuses.
        """
        text = json.dumps({"algorithm": "crc32", "chunks": self._chunks, "files": self._files})
        (folder / CHECKSUMS).write_text(text, encoding="utf-8")

    def check_chunk(self, path: Path, position: int, length: int) -> bool:
        """Compare a chunk's bytes. Returns whether there was anything to compare with.

        Raises:
            DamagedCheckpoint: they are not those that were written.
            OSError: they cannot be read.
        """
        wanted = self._chunks.get(path.name, {}).get(str(position))
        if wanted is None:
            return False
        if of_file(path, start=position, length=length) != wanted:
            raise DamagedCheckpoint(
                f"{path}: damaged: the {length} bytes from {position} on are not those that were written; "
                "copy the checkpoint again"
            )
        return True

    def check_file(self, path: Path) -> bool:
        """The same for a whole file, which may be missing."""
        wanted = self._files.get(path.name)
        if wanted is None or not path.exists():
            return False
        if of_file(path) != wanted:
            raise DamagedCheckpoint(f"{path}: damaged: is not what was written; copy the checkpoint again")
        return True


@contextlib.contextmanager
def reading(what: str) -> Iterator[Reading]:
    """Turn what goes wrong while a file is read into an error of the checkpoint.

    Raises:
        DamagedCheckpoint: its contents make no sense, and nothing has shown that they are what was written.
        CheckpointError: the file system or the machine's memory fails, which says nothing of the file and may pass.
    """
    state = Reading()
    try:
        yield state
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{what} cannot be read: {error}; copy the checkpoint again") from error
    except Exception as error:  # zip, pickle and JSON errors alike mean a damaged file
        text = f"{what} cannot be read ({type(error).__name__}: {error})"
        if not (state.verified or isinstance(error, (OSError, MemoryError))):
            raise DamagedCheckpoint(f"{text}; copy the checkpoint again") from error
        passing = CheckpointError(f"{text}; try again")
        passing.passing = True
        raise passing from error


@dataclass
class Reading:
    """What is known of a file that is being read."""

    verified: bool = False
    """Whether its bytes are those that were written."""
