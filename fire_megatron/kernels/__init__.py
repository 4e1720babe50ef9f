"""Triton kernels for what is bound by memory on a GPU: each goes over its inputs once, plain torch many times.

The plain torch that a kernel stands for is beside its call and runs everywhere else. On a machine without a GPU the
kernels are tested in Triton's interpreter, against float64. Modules here import Triton, so they are imported where
:func:`usable` says yes.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def _wanted() -> bool:
    """``FIRE_KERNELS=0`` leaves everything to plain torch, to find out whether a kernel is at fault."""
    return os.environ.get("FIRE_KERNELS") != "0" and find_spec("triton") is not None


def usable(tensor: torch.Tensor) -> bool:
    """Whether kernels take this tensor: of float32 or half precision, on a GPU, where torch brings Triton."""
    return tensor.is_cuda and tensor.dtype in _DTYPES and _wanted()
