"""Between Hugging Face folders and converted checkpoints, one tensor at a time.

Peak memory is one megatron-core tensor (of experts, one expert's part) and the Hugging Face tensors that it is made of
(in export, one output shard), whatever the size of the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fire_megatron.checkpoint.folder import carry_files, check_conversion, check_export
from fire_megatron.checkpoint.maps import Tensor, holds_fused_experts, is_ignored, pack, tensor_map, unpack
from fire_megatron.checkpoint.torch_dist import ShardReader, ShardWriter, write_metadata
from fire_megatron.checkpoint.whole import open_whole
from fire_megatron.config.checkpoints import MARKER, WEIGHTS
from fire_megatron.config.errors import CheckpointError
from fire_megatron.config.hf_config import ModelShape
from fire_megatron.metrics.progress import progress_bar
from fire_megatron.platform.files import new_folder, write_json
from fire_megatron.platform.watch import tick

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMAT = 1
_STORED = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Formats of weights in safetensors headers."""


class HFReader:
    """Tensors of a Hugging Face folder, read lazily from one or many safetensors files.

    safetensors maps a file into memory, and pages once read stay in the process's memory for as long as the map does;
    so each read maps the file anew.
    """

    def __init__(self, folder: Path) -> None:
        """Read every file's header and check the index against them.

        Raises:
            CheckpointError: no safetensors, a file that is missing or cut short, or an index that names tensors
                which are not there.
        """
        self.folder = folder
        self._file_of: dict[str, str] = {}
        self._shape_of: dict[str, tuple[int, ...]] = {}
        self._dtype_of: dict[str, str] = {}
        index = self._index()
        names = sorted(set(index.values())) if index else self._files_without_index()
        if not names:
            raise CheckpointError(
                f"{folder}: no *.safetensors; save the model with save_pretrained(..., safe_serialization=True)"
            )
        for name in names:
            with self._open(name) as opened:
                held = list(opened.keys())
                slices = {key: opened.get_slice(key) for key in held}
                self._shape_of |= {key: tuple(part.get_shape()) for key, part in slices.items()}
                self._dtype_of |= {key: part.get_dtype() for key, part in slices.items()}
            self._file_of |= dict.fromkeys(held, name)
        lost = sorted(set(index) - set(self._file_of))
        if lost:
            raise CheckpointError(
                f"{folder / INDEX}: names {len(lost)} tensors that no file holds, such as {lost[0]}; copy it again"
            )

    def _files_without_index(self) -> list[str]:
        """The file that transformers loads where it is there: some models come with a second copy of the weights."""
        found = sorted(path.name for path in self.folder.glob("*.safetensors"))
        return [SINGLE] if SINGLE in found else found

    def _index(self) -> dict[str, str]:
        path = self.folder / INDEX
        if not path.exists():
            return {}
        try:
            index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: not a safetensors index ({error}); copy it again") from error
        if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
            raise CheckpointError(f"{path}: not a safetensors index (weight_map names no files); copy it again")
        return index

    def _open(self, name: str) -> Any:
        path = self.folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, and {INDEX} says that it holds weights; copy it again")
        try:
            return safe_open(str(path), framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cut short or damaged ({error}); copy it again") from error

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return sorted(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._shape_of[name]

    def dtype(self, names: Iterable[str]) -> torch.dtype:
        """The dtype that holds all of these tensors exactly, without reading them.

        Raises:
            CheckpointError: one of them is not of a floating-point format.
        """
        kinds = {self._dtype_of[name]: name for name in names}
        for kind, name in kinds.items():
            if kind not in _STORED:
                raise CheckpointError(
                    f"{self.folder}: {name} is stored as {kind}; give the unquantized checkpoint ({', '.join(_STORED)})"
                )
        return reduce(torch.promote_types, (_STORED[kind] for kind in kinds))

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its stored dtype."""
        with self._open(self._file_of[name]) as opened:
            return opened.get_tensor(name)


def _check_names(reader: HFReader, tensors: list[Tensor], shape: ModelShape) -> None:
    """Compare what the folder holds with what the architecture has, before anything is written."""
    wanted = {name: size for t in tensors for name, size in zip(t.sources, t.shapes, strict=True)}
    held = set(reader.names)
    missing = [name for name in wanted if name not in held]
    unknown = [name for name in reader.names if name not in wanted and not is_ignored(name, shape)]
    for names, what in (
        (missing, "are missing"),
        (unknown, f"are not of a {shape.family} model as config.json has it"),
    ):
        if names:
            raise CheckpointError(
                f"{reader.folder}: {len(names)} tensors {what}: {', '.join(names[:4])}"
                f"{' ...' if len(names) > 4 else ''}; does config.json belong to these weights?"
            )
    for name, size in wanted.items():
        if reader.shape(name) != size:
            raise CheckpointError(
                f"{reader.folder}: {name} has shape {reader.shape(name)} and config.json says {size}; "
                "does config.json belong to these weights?"
            )


def _require_dtype(dtype: str | None) -> torch.dtype | None:
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(
            f"--dtype {dtype}: use one of {', '.join(DTYPES)}, or leave it out to keep the stored one"
        )
    return None if dtype is None else DTYPES[dtype]


def hf_to_megatron(
    hf: str | Path, out: str | Path, *, dtype: str | None = None, overwrite: bool = False, progress: bool = False
) -> Path:
    """Convert a Hugging Face folder to a checkpoint that loads at any TP x PP x EP.

    Args:
        hf: folder with config.json, safetensors and tokenizer.
        out: folder to make; whole or not at all.
        dtype: ``float32`` or ``bfloat16``; None keeps each tensor's own.
        overwrite: replace a converted checkpoint that is there.
        progress: show a bar.

    Raises:
        CheckpointError: the source is not a supported, complete model, or the target may not be written.
    """
    hf, out = Path(hf), Path(out)
    target_dtype = _require_dtype(dtype)
    shape = check_conversion(hf, out, overwrite=overwrite)
    reader = HFReader(hf)
    tensors = tensor_map(shape, fused=holds_fused_experts(reader.names, shape))
    _check_names(reader, tensors, shape)
    with new_folder(out) as temporary, ShardWriter(temporary / WEIGHTS, rank=0) as writer:
        (temporary / WEIGHTS).mkdir()
        stored: set[str] = set()
        for tensor in progress_bar(tensors, desc=f"converting {hf.name}", unit="tensor", show=progress):
            tick()
            kept = target_dtype or reader.dtype(tensor.sources)
            stored.add(str(kept).removeprefix("torch."))
            for where, piece in tensor.parts():
                parts = [reader.read(name).to(kept) for name in piece.sources]
                for row, part in pack(piece, parts, shape):
                    chunk = part[(None,) * len(where)]  # an expert's matrix is a slice of the stacked tensor
                    offset = (*where, row, *(0,) * (part.dim() - 1))
                    writer.write(tensor.key, chunk, offset=offset, global_shape=tensor.shape)
        write_metadata(temporary / WEIGHTS, writer.close(), common={})
        carry_files(hf, temporary)
        write_json(
            temporary / MARKER,
            {
                "format": FORMAT,
                "family": shape.family,
                "dtype": stored.pop() if len(stored) == 1 else "mixed",
                "vocab_size": shape.vocab_size,
            },
        )
    return out


def _export_tensors(
    reader: ShardReader, tensors: list[Tensor], shape: ModelShape, dtype: torch.dtype | None, progress: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    for tensor in progress_bar(tensors, desc="exporting", unit="tensor", show=progress):
        for where, piece in tensor.parts():
            whole = reader.read(tensor.key, at=where)
            for name, part in zip(piece.sources, unpack(piece, whole, shape), strict=True):
                yield name, part.to(dtype or part.dtype).contiguous().clone()


def _write_shards(
    folder: Path, tensors: Iterator[tuple[str, torch.Tensor]], shard_bytes: int
) -> tuple[dict[str, str], int]:
    """Write tensors to numbered files of at most ``shard_bytes`` (or one tensor); returns name -> file and bytes."""
    batches: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    total = size = 0

    def flush() -> None:
        path = folder / f"part-{len(batches):05d}"
        try:
            save_file(held, str(path), metadata={"format": "pt"})
        except SafetensorError as error:  # what it makes of a disk that is full
            raise OSError(f"{path}: {error}") from error
        batches.append(list(held))
        held.clear()

    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if held and size + nbytes > shard_bytes:
            flush()
            size = 0
        held[name] = tensor
        size, total = size + nbytes, total + nbytes
    flush()
    files: dict[str, str] = {}
    for number, names in enumerate(batches):
        final = SINGLE if len(batches) == 1 else f"model-{number + 1:05d}-of-{len(batches):05d}.safetensors"
        (folder / f"part-{number:05d}").rename(folder / final)
        (folder / final).chmod(0o644)  # safetensors makes files that only their owner reads
        files |= dict.fromkeys(names, final)
    return files, total


def megatron_to_hf(
    checkpoint: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    shard_gb: float = 5.0,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Export a converted checkpoint, or a step of a run, to a Hugging Face folder that transformers loads.

    Args:
        checkpoint: folder with fire_checkpoint.json.
        out: folder to make; whole or not at all.
        dtype: ``float32`` or ``bfloat16``; None keeps the stored one.
        shard_gb: largest safetensors file, in GB (10^9 bytes); also the peak memory.
        overwrite: replace a Hugging Face folder that is there.
        progress: show a bar.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged, or the target may not be written.
    """
    source, out = Path(checkpoint), Path(out)
    target_dtype = _require_dtype(dtype)
    if not 0 < shard_gb < float("inf"):
        raise CheckpointError(f"--shard-gb {shard_gb}: give a size above 0")
    shape = check_export(source, out, overwrite=overwrite)
    reader, tensors = open_whole(source, shape), tensor_map(shape)
    with new_folder(out) as temporary:
        carry_files(source, temporary)
        exported = _export_tensors(reader, tensors, shape, target_dtype, progress)
        files, total = _write_shards(temporary, exported, int(shard_gb * 1e9))
        if len(set(files.values())) > 1:
            write_json(temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": files})
        _set_config_dtype(temporary / "config.json", target_dtype or reader.tensors[tensors[0].key].dtype)
    return out


def _set_config_dtype(path: Path, dtype: torch.dtype) -> None:
    """transformers loads in the dtype that config.json names, so it must be the one that was written."""
    config = json.loads(path.read_text(encoding="utf-8"))
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    config[key] = str(dtype).removeprefix("torch.")
    write_json(path, config)
