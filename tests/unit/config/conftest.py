"""A recipe whose files exist: converted checkpoints reduced to their JSON, and a file of prompts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MODEL = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 256,
    "max_position_embeddings": 2048,
}


def _make_checkpoint(folder: Path, *, converted: bool = True, **model: Any) -> Path:
    """A folder that passes for a checkpoint as long as nobody reads its weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(MODEL | model))
    if converted:
        (folder / "weights").mkdir()
        (folder / "weights" / ".metadata").write_bytes(b"")
        (folder / "fire_checkpoint.json").write_text(json.dumps({"format": 1}))
    else:
        (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture
def make_checkpoint() -> Callable[..., Path]:
    """``make_checkpoint(folder, converted=True, **model)``."""
    return _make_checkpoint


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """Plain values of a correct recipe for two teachers."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"problem": "1 + 1", "label": "math"}\n')
    return {
        "run": {"name": "test", "dir": str(tmp_path / "run"), "steps": 3},
        "student": {"checkpoint": str(_make_checkpoint(tmp_path / "student"))},
        "teachers": {
            "math": {"checkpoint": str(_make_checkpoint(tmp_path / "math", num_hidden_layers=8))},
            "code": {"checkpoint": str(_make_checkpoint(tmp_path / "code")), "labels": ["python", "sql"]},
        },
        "data": {"train": [{"path": str(prompts), "label": "math"}, {"path": str(prompts)}]},
        "rollout": {"prompts_per_step": 4, "max_new_tokens": 16},
    }
