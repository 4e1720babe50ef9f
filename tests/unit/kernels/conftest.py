"""Triton in its interpreter, where there is no GPU.

It lies beside the other packages and not among them (Makefile): megatron-core would import it in every process of every
test.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    sys.path.append(str(Path(sys.prefix, "triton")))


@pytest.fixture(autouse=True)
def triton() -> None:
    """Skips, saying why, where it is missing."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed: `make venv` does it")
