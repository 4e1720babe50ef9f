"""Triton's interpreter, where there is no GPU.

It lies beside the other packages and not among them (Makefile): megatron-core would import it in every process of every
test.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fire_megatron import kernels

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    sys.path.append(str(Path(sys.prefix, "triton")))
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed: `make venv` puts it into the environment's folder"
)


def by_kernels(monkeypatch) -> None:
    """Everything but float64 goes to the kernels."""
    monkeypatch.setattr(kernels, "usable", lambda tensor: tensor.dtype != torch.float64)
