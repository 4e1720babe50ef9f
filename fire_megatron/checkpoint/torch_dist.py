"""The torch_dist format (PyTorch distributed checkpoint), written and read one tensor at a time.

``torch.distributed.checkpoint`` and ``megatron.core.dist_checkpointing`` read what is written here and the other way
round; tests hold both to it. They are not used for the input and output itself because torch 2.13's writer keeps every
tensor of a file in memory until the file is complete, and because megatron's save and load communicate over the whole
world, which a role on a span of ranks must not do. Here nothing communicates: the caller gathers the writers' entries
on a group of its own, and a reader needs no other rank.

A tensor is stored as non-overlapping rectangular chunks; ``.metadata`` tells where each chunk lies.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from fire_megatron.checkpoint.checksums import Checksums, Counting, of_file, reading
from fire_megatron.config.errors import DamagedCheckpoint

METADATA = ".metadata"
COMMON = "common.pt"
_FILE_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Entry:
    """One chunk of one tensor, and where it lies."""

    key: str
    global_shape: tuple[int, ...]
    dtype: torch.dtype
    offset: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    position: int
    length: int
    checksum: int | None = None
    """Of its bytes; None where it is not known."""


class ShardWriter:
    """Appends chunks to this process's own ``*.distcp`` files. Peak memory: the chunk being written."""

    def __init__(self, folder: Path, *, rank: int, file_bytes: int = _FILE_BYTES) -> None:
        """Args: folder: existing; rank: names the files, so unique among the writers; file_bytes: a file's limit."""
        self._folder, self._rank, self._limit = folder, rank, file_bytes
        self._count = 0
        self._stream: BinaryIO | None = None
        self._entries: list[Entry] = []

    def write(self, key: str, chunk: torch.Tensor, *, offset: Sequence[int], global_shape: Sequence[int]) -> None:
        """Append one chunk.

        Args:
            key: name of the tensor.
            chunk: any device and strides; stored contiguous.
            offset: position of the chunk in the tensor; as many numbers as dimensions.
            global_shape: shape of the whole tensor.
        """
        data = chunk.detach().to("cpu").contiguous()
        if data.untyped_storage().nbytes() != data.numel() * data.element_size():
            data = data.clone()  # torch.save stores the whole storage that a view looks at
        stream = self._open()
        position = stream.tell()
        counted = Counting(stream)
        _save(data, counted)
        self._entries.append(
            Entry(
                key, tuple(global_shape), data.dtype, tuple(offset), tuple(data.shape),
                Path(stream.name).name, position, stream.tell() - position, counted.checksum,
            )
        )  # fmt: skip

    def _open(self) -> BinaryIO:
        if self._stream is not None and self._stream.tell() >= self._limit:
            self._finish_file()
        if self._stream is None:
            self._stream = (self._folder / f"__{self._rank}_{self._count}.distcp").open("wb")
            self._count += 1
        return self._stream

    def _finish_file(self) -> None:
        if self._stream is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._stream = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        """Let go of a file that an error has cut short; what still waited to be written is lost with it."""
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.close()

    def close(self) -> list[Entry]:
        """Flush to the disk and return what was written."""
        self._finish_file()
        return self._entries


def _save(value: Any, target: Path | Counting) -> None:
    """``torch.save`` whose zip writer's RuntimeError, such as of a full disk, is the OSError that it was.

    Raises:
        OSError: the file system refuses.
    """
    try:
        torch.save(value, target)
    except RuntimeError as error:
        raise OSError(f"{getattr(target, 'name', target)}: {error.__context__ or error}") from error


def write_metadata(folder: Path, entries: Sequence[Entry], *, common: dict[str, Any]) -> None:
    """Complete a folder of ``*.distcp`` files.

    Args:
        folder: where the writers wrote.
        entries: all writers' entries together.
        common: small values that are the same on every rank; ``common.pt``.

    Raises:
        OSError: the file system refuses.
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for entry in entries:
        if entry.key not in tensors:
            properties = TensorProperties(dtype=entry.dtype)
            tensors[entry.key] = TensorStorageMetadata(properties, torch.Size(entry.global_shape), [])
        known = tensors[entry.key]
        assert tuple(known.size) == entry.global_shape and known.properties.dtype == entry.dtype, entry
        known.chunks.append(ChunkStorageMetadata(torch.Size(entry.offset), torch.Size(entry.sizes)))
        storage[MetadataIndex(entry.key, entry.offset)] = _StorageInfo(entry.file, entry.position, entry.length)
    _save(common, folder / COMMON)
    settings = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    (folder / "metadata.json").write_text(json.dumps(settings), encoding="utf-8")
    with (folder / METADATA).open("wb") as stream:
        pickle.dump(Metadata(tensors, storage_data=storage, version="1.0.0"), stream)
    chunks: dict[str, dict[str, int]] = defaultdict(dict)
    for entry in entries:
        if entry.checksum is not None:
            chunks[entry.file][str(entry.position)] = entry.checksum
    Checksums(chunks, {name: of_file(folder / name) for name in (METADATA, COMMON)}).save(folder)


class _MetadataUnpickler(pickle.Unpickler):
    """Reads ``.metadata`` without running code that a file from elsewhere might name."""

    def find_class(self, module: str, name: str) -> Any:
        if "." not in name:
            found = (
                super().find_class(module, name) if module.split(".")[0] in ("torch", "pathlib", "megatron") else None
            )
            if isinstance(found, (torch.dtype, torch.layout)) or found is torch.serialization._get_layout:
                return found
            home = getattr(found, "__module__", "")
            if isinstance(found, type) and (
                home.startswith(("torch.distributed.checkpoint.", "torch.distributed._shard.", "pathlib"))
                or found is torch.Size
                or name in ("MCoreMetadata", "MCoreSavePlan")
            ):
                return found
        raise pickle.UnpicklingError(f"refuses {module}.{name}")


@dataclass(frozen=True)
class StoredTensor:
    """What the metadata says of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    entries: tuple[Entry, ...]


class ShardReader:
    """Reads parts of tensors. Peak memory: the largest stored chunk that the part touches."""

    def __init__(self, folder: Path) -> None:
        """Read the metadata.

        Raises:
            CheckpointError: it is missing, damaged, or names anything but tensors' places.
        """
        self.folder = folder
        self._checksums = Checksums.read(folder)
        if not (folder / METADATA).exists():
            raise DamagedCheckpoint(f"{folder}: has no {METADATA}; the checkpoint is incomplete")
        # Verified or not: one from elsewhere may be whole and yet not for us, which no other attempt changes.
        with reading(f"{folder / METADATA}:"):
            self._checksums.check_file(folder / METADATA)
            with (folder / METADATA).open("rb") as stream:
                metadata = _MetadataUnpickler(stream).load()
            self.tensors = _stored_tensors(metadata)

    def check_files(self) -> None:
        """Compare the files' sizes with the metadata.

        Raises:
            CheckpointError: files are missing or shorter than the metadata says; all of them are listed.
        """
        ends: dict[str, int] = defaultdict(int)
        for stored in self.tensors.values():
            for entry in stored.entries:
                ends[entry.file] = max(ends[entry.file], entry.position + entry.length)
        problems = []
        for name, end in sorted(ends.items()):
            path = self.folder / name
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                problems.append(f"{path} is missing")
            elif size < end:
                problems.append(f"{path} is cut short: {size} bytes of {end}")
        if problems:
            raise DamagedCheckpoint(
                f"{self.folder}: damaged checkpoint: " + "; ".join(problems[:8]) + "; copy it again"
            )

    def read_into(self, target: torch.Tensor, key: str, *, offset: Sequence[int]) -> None:
        """Fill ``target`` with the part of a tensor that starts at ``offset``, cast to the target's dtype.

        Positions outside the stored tensor (padding rows of a vocabulary) become zero.

        Args:
            target: any device and strides, as many dimensions as the stored tensor; written in place.
            key: name of the tensor; must be in :attr:`tensors`.
            offset: position of the target in the tensor.

        Raises:
            DamagedCheckpoint: a chunk cannot be read, or is not what was written.
        """
        stored = self.tensors[key]
        if any(o + n > s for o, n, s in zip(offset, target.shape, stored.shape, strict=True)):
            target.zero_()
        for entry in stored.entries:
            low = [max(a, b) for a, b in zip(offset, entry.offset, strict=True)]
            high = [
                min(a + n, b + m) for a, n, b, m in zip(offset, target.shape, entry.offset, entry.sizes, strict=True)
            ]
            if all(a < b for a, b in zip(low, high, strict=True)):
                inside = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))
                source = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, entry.offset, strict=True))
                target[inside].copy_(self._chunk(entry)[source])

    def read(self, key: str, *, at: tuple[int, ...] = ()) -> torch.Tensor:
        """A whole tensor, or what lies at these leading indices of it, in its stored dtype on the CPU."""
        stored = self.tensors[key]
        target = torch.empty(stored.shape[len(at) :], dtype=stored.dtype)
        self.read_into(target[(None,) * len(at)], key, offset=(*at, *(0,) * target.dim()))
        return target

    def _chunk(self, entry: Entry) -> torch.Tensor:
        path = self.folder / entry.file
        with reading(f"{path}: {entry.key}") as state:
            state.verified = self._checksums.check_chunk(path, entry.position, entry.length)
            with path.open("rb") as stream:
                view = _create_file_view(stream, entry.position, entry.length)
                chunk = torch.load(view, map_location="cpu", weights_only=True)
        if not isinstance(chunk, torch.Tensor) or tuple(chunk.shape) != entry.sizes or chunk.dtype != entry.dtype:
            raise DamagedCheckpoint(f"{path}: {entry.key} is not what {METADATA} says; copy the checkpoint again")
        return chunk


def _stored_tensors(metadata: Any) -> dict[str, StoredTensor]:
    """Join the metadata's two tables and check that the chunks of each tensor add up to it."""
    tensors = {}
    for key, stored in metadata.state_dict_metadata.items():
        if not isinstance(stored, TensorStorageMetadata):
            continue
        entries = []
        for chunk in stored.chunks:
            place = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            if place.transform_descriptors:
                raise ValueError(f"{key} is stored with {place.transform_descriptors}, which is not supported")
            if os.path.basename(place.relative_path) != place.relative_path:
                raise ValueError(f"{key} lies outside the folder: {place.relative_path}")
            entries.append(
                Entry(
                    key, tuple(stored.size), stored.properties.dtype, tuple(chunk.offsets), tuple(chunk.sizes),
                    place.relative_path, place.offset, place.length,
                )
            )  # fmt: skip
        if sum(math.prod(entry.sizes) for entry in entries) != math.prod(stored.size):
            raise ValueError(f"{key}: the stored chunks do not add up to its shape {tuple(stored.size)}")
        tensors[key] = StoredTensor(tuple(stored.size), stored.properties.dtype, tuple(entries))
    return tensors


def read_common(folder: Path) -> dict[str, Any]:
    """The values stored beside the tensors.

    Raises:
        DamagedCheckpoint: ``common.pt`` is missing or damaged.
    """
    with reading(f"{folder / COMMON}:") as state:
        state.verified = Checksums.read(folder).check_file(folder / COMMON)
        return torch.load(folder / COMMON, map_location="cpu", weights_only=True)
