"""Between Hugging Face folders and converted checkpoints, one tensor at a time.

Peak memory is one megatron-core tensor (of experts, one expert's part) and the Hugging Face tensors that it is made of
(in export, one output shard), whatever the size of the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fire_megatron.checkpoint.folder import carry_files, check_conversion, check_export, read_hf_folder
from fire_megatron.checkpoint.hf_names import check_head, check_names
from fire_megatron.checkpoint.hf_tensors import INDEX, SINGLE, HFReader
from fire_megatron.checkpoint.maps import Tensor, holds_fused_experts, pack, tensor_map, unpack
from fire_megatron.checkpoint.torch_dist import ShardReader, ShardWriter, write_metadata
from fire_megatron.checkpoint.whole import open_whole
from fire_megatron.config.checkpoints import MARKER, WEIGHTS, read_json_object, read_marker
from fire_megatron.config.errors import CheckpointError
from fire_megatron.config.hf_config import ModelShape
from fire_megatron.metrics.progress import progress_bar
from fire_megatron.platform.files import new_folder, write_json
from fire_megatron.platform.watch import tick

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMAT = 1


def _require_dtype(dtype: str | None) -> torch.dtype | None:
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"--dtype {dtype}: use one of {', '.join(DTYPES)}, or leave it out to keep the source's")
    return None if dtype is None else DTYPES[dtype]


def open_hf(folder: Path) -> tuple[ModelShape, HFReader]:
    """Look at a Hugging Face folder without reading its weights.

    Raises:
        CheckpointError: it is not a whole model of a supported architecture.
    """
    shape, fp8 = read_hf_folder(folder)
    reader = HFReader(folder, fp8)
    check_names(reader, _tensors(reader, shape), shape)
    return shape, reader


def _tensors(reader: HFReader, shape: ModelShape) -> list[Tensor]:
    return tensor_map(shape, fused=holds_fused_experts(reader.names, shape))


def hf_to_megatron(
    hf: str | Path, out: str | Path, *, dtype: str | None = None, overwrite: bool = False, progress: bool = False
) -> Path:
    """Convert a Hugging Face folder to a checkpoint that loads at any TP x PP x EP.

    Args:
        hf: folder with config.json, safetensors and tokenizer.
        out: folder to make; whole or not at all.
        dtype: ``float32`` or ``bfloat16``; None keeps each tensor's own, and that which an FP8 release runs in.
        overwrite: replace a converted checkpoint that is there.
        progress: show a bar.

    Raises:
        CheckpointError: the source is not a supported, complete model, or the target may not be written.
    """
    hf, out = Path(hf), Path(out)
    target_dtype = _require_dtype(dtype)
    check_conversion(hf, out, overwrite=overwrite)
    shape, reader = open_hf(hf)
    tensors = _tensors(reader, shape)
    check_head(reader, tensors, shape)
    dtypes = {name: target_dtype or reader.dtype(name) for tensor in tensors for name in tensor.sources}
    with new_folder(out) as temporary, ShardWriter(temporary / WEIGHTS, rank=0) as writer:
        (temporary / WEIGHTS).mkdir()
        stored: set[str] = set()
        for tensor in progress_bar(tensors, desc=f"converting {hf.name}", unit="tensor", show=progress):
            tick()
            kept = reduce(torch.promote_types, (dtypes[name] for name in tensor.sources))
            stored.add(_name(kept))
            for where, piece in tensor.parts():
                parts = [reader.read(name).to(kept) for name in piece.sources]
                for row, part in pack(piece, parts, shape):
                    chunk = part[(None,) * len(where)]  # an expert's matrix is a slice of the stacked tensor
                    offset = (*where, row, *(0,) * (part.dim() - 1))
                    writer.write(tensor.key, chunk, offset=offset, global_shape=tensor.shape)
        write_metadata(temporary / WEIGHTS, writer.close(), common={})
        carry_files(hf, temporary)
        _change_config(temporary, quantization_config=None)
        marker = {"format": FORMAT, "family": shape.family, "vocab_size": shape.vocab_size}
        write_json(
            temporary / MARKER,
            marker | {"dtype": stored.pop() if len(stored) == 1 else "mixed"} | _source_dtypes(tensors, dtypes, shape),
        )
    return out


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _source_dtypes(tensors: list[Tensor], dtypes: Mapping[str, torch.dtype], shape: ModelShape) -> dict[str, Any]:
    """Entries of the marker that say what an export is to be written in, by the names that it will have."""
    single: dict[str, str] = {}
    for tensor, exported in zip(tensors, tensor_map(shape), strict=True):
        kinds = [_name(dtypes[name]) for name in tensor.sources]
        same = len(kinds) == len(exported.sources)  # or else a layer's experts in one
        single |= dict(zip(exported.sources, kinds if same else kinds * len(exported.sources), strict=True))
    [(most, _)] = Counter(single.values()).most_common(1)
    return {"source_dtype": most, "source_dtypes": {name: kind for name, kind in single.items() if kind != most}}


def _export_tensors(
    reader: ShardReader, tensors: list[Tensor], shape: ModelShape, dtypes: Mapping[str, torch.dtype], progress: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    for tensor in progress_bar(tensors, desc="exporting", unit="tensor", show=progress):
        for where, piece in tensor.parts():
            whole = reader.read(tensor.key, at=where)
            for name, part in zip(piece.sources, unpack(piece, whole, shape), strict=True):
                yield name, part.to(dtypes[name]).contiguous().clone()


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
        dtype: ``float32`` or ``bfloat16``; None is that in which each tensor came to the conversion, whatever a run has
            computed in since.
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
    dtypes = _export_dtypes(reader, tensors, read_marker(source) or {}, target_dtype)
    with new_folder(out) as temporary:
        carry_files(source, temporary)
        exported = _export_tensors(reader, tensors, shape, dtypes, progress)
        files, total = _write_shards(temporary, exported, int(shard_gb * 1e9))
        if len(set(files.values())) > 1:
            write_json(temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": files})
        _set_config_dtype(temporary, list(map(_name, dtypes.values())))
    return out


def _export_dtypes(
    reader: ShardReader, tensors: list[Tensor], marker: Mapping[str, Any], told: torch.dtype | None
) -> dict[str, torch.dtype]:
    """What each Hugging Face tensor is written in."""
    others, most = marker.get("source_dtypes", {}), marker.get("source_dtype")
    source = {name: getattr(torch, kind) for name, kind in others.items()}
    usual = getattr(torch, most) if most else None
    return {
        name: told or source.get(name) or usual or reader.tensors[tensor.key].dtype
        for tensor in tensors
        for name in tensor.sources
    }


def _set_config_dtype(folder: Path, written: list[str]) -> None:
    """transformers loads in the dtype that config.json names, so it must be one that was written."""
    config = read_json_object(folder / "config.json") or {}
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    named = next((config[key] for key in keys if config.get(key) in written), None)
    _change_config(folder, **dict.fromkeys(keys, named or Counter(written).most_common(1)[0][0]))


def _change_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json; None removes one."""
    path = folder / "config.json"
    config = read_json_object(path) or {}
    changed = {key: value for key, value in (config | changes).items() if value is not None or key not in changes}
    if changed != config:
        write_json(path, changed)
