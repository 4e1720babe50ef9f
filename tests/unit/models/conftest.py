"""``config.json`` files, as transformers writes them and as they are found in the wild."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from models import FAMILIES, SIZES, in_release


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    """``write_config(**changes)`` writes a Llama's config of before transformers 5; None removes a key."""

    def write(**changes: Any) -> Path:
        values = {"model_type": "llama", "rope_theta": 10000.0, **SIZES, **changes}
        text = json.dumps({key: value for key, value in values.items() if value is not None})
        (tmp_path / "config.json").write_text(text)
        return tmp_path

    return write


@pytest.fixture
def save_config(tmp_path: Path) -> Callable[..., Any]:
    """``save_config(family, **changes)`` has transformers write the config to ``tmp_path``; returns the config."""

    def save(family: str, **changes: Any) -> Any:
        prefix, settings = FAMILIES[family]
        config = getattr(transformers, f"{prefix}Config")(**in_release({**SIZES, **settings, **changes}))
        config.save_pretrained(tmp_path)
        return config

    return save
