"""Chatter of other packages, kept off the console, where it would stand before our own messages. Imports no torch."""

from __future__ import annotations

import logging
import os
import sys
import warnings

_PACKAGES = (
    "absl", "apex", "flash_attn", "google", "huggingface_hub", "latex2sympy2_extended", "math_verify", "megatron",
    "nvidia", "pynvml", "safetensors", "sympy", "tensorboard", "tokenizers", "torch", "transformer_engine",
    "transformers", "triton",
)  # fmt: skip
_TALKATIVE = (
    "huggingface_hub", "megatron", "megatron.core", "torch", "torch.distributed", "torch.utils.cpp_extension",
    "transformer_engine", "transformers",
)  # fmt: skip
"""Loggers that warn of what a run does on purpose, or of what our own report says."""
_LEVELS = {"TRANSFORMERS_VERBOSITY": "error", "TORCH_CPP_LOG_LEVEL": "ERROR", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}


def quiet_third_parties() -> None:
    """Show errors alone of the packages that we use, from their import on; of the user's own modules everything.

    What ``-W`` or ``PYTHONWARNINGS`` ask for is shown.
    """
    for name, level in _LEVELS.items():
        os.environ.setdefault(name, level)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    if sys.warnoptions:
        return
    # Also those that a package lays at the door of its caller, which is this one, or of the import itself.
    names = "|".join((*_PACKAGES, "fire_megatron", "importlib"))
    warnings.filterwarnings("ignore", module=rf"({names})(\.|$)")
    warnings.filterwarnings("ignore", message=".*(absl.logging|[Aa]pex|Transformer Engine|[Gg]rouped.*gemm).*")
    warnings.filterwarnings("ignore", category=FutureWarning)
