"""Folders of weights to convert, and what they hold."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_hf
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]


def _read_weights(folder: Path) -> Weights:
    """All tensors of a Hugging Face folder, by name; no tensor may be in two files."""
    weights: Weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        held = load_file(path)
        assert not weights.keys() & held.keys(), f"{path} repeats tensors of another file"
        weights |= held
    return weights


def _snapshot(folder: Path) -> dict[str, str]:
    """Every file and folder below ``folder`` with a digest of its contents."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="session")
def read_weights() -> Callable[[Path], Weights]:
    """``read_weights(folder)``."""
    return _read_weights


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Path], dict[str, str]]:
    """``snapshot(folder)``; two are equal when nothing has changed in between."""
    return _snapshot


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Hugging Face folder that no test may change."""
    folder = tmp_path_factory.mktemp("published") / "model"
    save_hf("llama", folder, num_hidden_layers=2)
    return folder


@pytest.fixture
def damaged(published: Path, tmp_path: Path) -> Callable[..., Path]:
    """``damaged(weights=function of the tensors, **changes to config.json)`` makes a copy of :func:`published`."""

    def make(weights: Callable[[Weights], Any] | None = None, **config: Any) -> Path:
        folder = tmp_path / "hf"
        shutil.copytree(published, folder)
        if weights is not None:
            tensors = load_file(folder / "model.safetensors")
            weights(tensors)
            save_file(tensors, folder / "model.safetensors")
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return folder

    return make
