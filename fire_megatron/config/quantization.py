"""Quantised releases that conversion can read. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fp8Blocks:
    """Weights in E4M3 with a scale for each block, which a value is to be multiplied with (``weight_scale_inv``)."""

    rows: int
    """Of a block, along a weight's second last dimension."""
    columns: int
    """Along its last."""
    dtype: str
    """What the model runs in, and its weights are dequantised to: ``bfloat16``, ``float16`` or ``float32``."""


def fp8_blocks(config: Mapping[str, Any]) -> Fp8Blocks | None:
    """How a ``config.json`` says that weights are quantised; None where it does not, or in another way."""
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping) or settings.get("quant_method") != "fp8":
        return None
    block = settings.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        return None
    dtype = config.get("dtype") or config.get("torch_dtype")
    return Fp8Blocks(*block, dtype if dtype in ("float32", "float16") else "bfloat16")
