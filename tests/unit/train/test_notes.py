"""What a run says at its start of what it does without being asked."""

from __future__ import annotations

import pytest

from fire_megatron.config.load import recipe_from_dict
from fire_megatron.models import build
from fire_megatron.platform.capabilities import Capability
from fire_megatron.platform.device import Device
from fire_megatron.train.inputs import _engine_notes

CUDA = Device("cuda")


def recipe(**roles: dict):
    """Of roles without checkpoints."""
    return recipe_from_dict(
        {
            "run": {"name": "x", "dir": "x", "steps": 1},
            "student": {"checkpoint": "x", **roles.pop("student", {})},
            "teachers": {name: {"checkpoint": "x", **values} for name, values in roles.items()},
            "data": {"train": [{"path": "x"}]},
            "rollout": {"prompts_per_step": 1, "max_new_tokens": 1},
        }
    )


@pytest.mark.parametrize("installed", [True, False])
def test_float32_by_transformer_engine_is_said_to_be_tf32(monkeypatch, installed):
    engine = Capability("transformer-engine", "2.20" if installed else None, "")
    monkeypatch.setattr(build, "detect_capabilities", lambda device: (engine,))
    wide = {"precision": {"dtype": "float32"}}
    said = _engine_notes(recipe(student=wide, math={}, code=wide, text={**wide, "layer_spec": "local"}), CUDA)
    assert len(said) == installed
    if installed:
        assert said[0].startswith("student, teachers.code: ") and "TF32" in said[0] and "layer_spec=local" in said[0]
    assert _engine_notes(recipe(math={}), CUDA) == [], "bfloat16 is the default of a GPU"
    monkeypatch.undo()
    assert _engine_notes(recipe(math={}), Device("cpu")) == []
