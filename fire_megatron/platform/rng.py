"""Seeding and saving of every random generator that a step may draw from."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch

from fire_megatron.platform.device import Device


def seed_everything(seed: int, *, device: Device) -> None:
    """Seed Python, numpy, torch and the device generator alike on every rank."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if device.is_cuda:
        torch.cuda.manual_seed(seed)


def get_rng_state(*, device: Device) -> dict[str, Any]:
    """States of all generators as tensors, lists and numbers, to be saved with a checkpoint."""
    return {
        "python": [list(part) if isinstance(part, tuple) else part for part in random.getstate()],
        "numpy": [part.tolist() if isinstance(part, numpy.ndarray) else part for part in numpy.random.get_state()],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device.index) if device.is_cuda else None,
    }


def set_rng_state(state: dict[str, Any], *, device: Device) -> None:
    """Restore what :func:`get_rng_state` returned. A GPU state is ignored on CPU and the other way round."""
    random.setstate(tuple(tuple(part) if isinstance(part, list) else part for part in state["python"]))
    numpy.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if device.is_cuda and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device.index)
