"""``config.json`` files, as transformers writes them and as they are found in the wild."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from models import FAMILIES

_SIZES = {
    "vocab_size": 301,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    """``write_config(**changes)`` writes a Llama's config of before transformers 5; None removes a key."""

    def write(**changes: Any) -> Path:
        values = {"model_type": "llama", "rope_theta": 10000.0, **_SIZES, **changes}
        text = json.dumps({key: value for key, value in values.items() if value is not None})
        (tmp_path / "config.json").write_text(text)
        return tmp_path

    return write


@pytest.fixture
def save_config(tmp_path: Path) -> Callable[..., Any]:
    """``save_config(family, **changes)`` has transformers write the config to ``tmp_path``; returns the config."""

    def save(family: str, **changes: Any) -> Any:
        prefix, settings = FAMILIES[family]
        config = getattr(transformers, f"{prefix}Config")(**{**_SIZES, **settings, **changes})
        config.save_pretrained(tmp_path)
        return config

    return save
