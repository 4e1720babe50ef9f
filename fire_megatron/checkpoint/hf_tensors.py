"""Reading the weights of a Hugging Face folder, tensor by tensor; those of FP8 releases come out dequantised."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fire_megatron.config.errors import CheckpointError
from fire_megatron.config.quantization import Fp8Blocks

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_STORED = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Formats of weights in safetensors headers."""
_FP8 = "F8_E4M3"
_SCALE = "_scale_inv"
"""Follows the name of a weight in that of its scales."""


class HFReader:
    """Tensors of a Hugging Face folder, read lazily from one or many safetensors files.

    safetensors maps a file into memory, and pages once read stay in the process's memory for as long as the map does;
    so each read maps the file anew.
    """

    def __init__(self, folder: Path, fp8: Fp8Blocks | None = None) -> None:
        """Read every file's header and check the index against them.

        Args:
            folder: of the model.
            fp8: how its config.json says that weights are quantised; None where it says nothing.

        Raises:
            CheckpointError: no safetensors, a file that is missing or cut short, an index that names tensors which are
                not there, or FP8 weights whose scales are of another shape.
        """
        self.folder, self._fp8 = folder, fp8
        self._file_of: dict[str, str] = {}
        self._shape_of: dict[str, tuple[int, ...]] = {}
        self._dtype_of: dict[str, str] = {}
        # transformers takes the single file where there is one, whatever an index beside it says.
        index = {} if (folder / SINGLE).is_file() else self._index()
        for name in [SINGLE] if (folder / SINGLE).is_file() else sorted(set(index.values())) or self._files():
            with self._open(name) as opened:
                held = list(opened.keys())
                again = sorted(self._file_of.keys() & held)
                if again:
                    raise CheckpointError(
                        f"{folder}: {again[0]} is in {self._file_of[again[0]]} and in {name}; leave the weights of one "
                        "model in the folder"
                    )
                slices = {key: opened.get_slice(key) for key in held}
                self._shape_of |= {key: tuple(part.get_shape()) for key, part in slices.items()}
                self._dtype_of |= {key: part.get_dtype() for key, part in slices.items()}
            self._file_of |= dict.fromkeys(held, name)
        lost = sorted(set(index) - set(self._file_of))
        if lost:
            raise CheckpointError(
                f"{folder / INDEX}: names {len(lost)} tensors that no file holds, such as {lost[0]}; copy it again"
            )
        quantized = [name for name, kind in self._dtype_of.items() if fp8 and kind == _FP8]
        self._scale_of = {name: name + _SCALE for name in quantized if name + _SCALE in self._file_of}
        if fp8:
            self._check_scales(fp8)

    def _files(self) -> list[str]:
        found = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not found:
            raise CheckpointError(
                f"{self.folder}: no *.safetensors; save the model with save_pretrained(..., safe_serialization=True)"
            )
        return found

    def _index(self) -> Mapping[str, str]:
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

    def _check_scales(self, fp8: Fp8Blocks) -> None:
        for name, scale in self._scale_of.items():
            *stacked, rows, columns = self._shape_of[name]
            wanted = (*stacked, -(-rows // fp8.rows), -(-columns // fp8.columns))
            if self._shape_of[scale] != wanted:
                raise CheckpointError(
                    f"{self.folder}: {scale} has shape {self._shape_of[scale]}, and {fp8.rows} x {fp8.columns} blocks "
                    f"(quantization_config.weight_block_size) make {wanted}; does config.json belong to these weights?"
                )

    @property
    def names(self) -> list[str]:
        """Names of all tensors; the scales of FP8 weights belong to those."""
        return sorted(self._file_of.keys() - self._scale_of.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._shape_of[name]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor is stored in, without reading it; of an FP8 weight that which the model runs in.

        Raises:
            CheckpointError: it is not of a floating-point format.
        """
        if self._fp8 and name in self._scale_of:
            return getattr(torch, self._fp8.dtype)
        kind = self._dtype_of[name]
        if kind not in _STORED:
            raise CheckpointError(
                f"{self.folder}: {name} is stored as {kind}; give the unquantized checkpoint ({', '.join(_STORED)})"
            )
        return _STORED[kind]

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its stored dtype; an FP8 weight times its scales, in float32."""
        tensor = self._stored(name)
        if self._fp8 is None or name not in self._scale_of:
            return tensor
        scale = self._stored(self._scale_of[name]).float()
        rows, columns = tensor.shape[-2:]
        scale = scale.repeat_interleave(self._fp8.rows, dim=-2)[..., :rows, :]
        return tensor.float().mul_(scale.repeat_interleave(self._fp8.columns, dim=-1)[..., :columns])

    def _stored(self, name: str) -> torch.Tensor:
        with self._open(self._file_of[name]) as opened:
            return opened.get_tensor(name)
