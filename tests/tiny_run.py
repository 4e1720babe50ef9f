"""A whole run in miniature: a student, two teachers, prompts and a recipe, made in a second, run in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from models import save_megatron, write_prompts

from fire_megatron.metrics.jsonl import read_metrics

__all__ = ["make_inputs", "read_metrics", "tiny_recipe", "train", "write_recipe"]


def make_inputs(folder: Path, **student: Any) -> Path:
    """Write ``student``, ``math``, ``code`` (converted checkpoints) and a prompt file of each label; returns folder.

    The teachers differ from the student in depth, width and family.
    """
    save_megatron("qwen3", folder / "student", **{"num_hidden_layers": 2, **student})
    save_megatron("qwen3", folder / "math", seed=1, num_hidden_layers=3)
    save_megatron("llama", folder / "code", seed=2, num_hidden_layers=2, hidden_size=32)
    write_prompts(folder / "math.jsonl", "math", 6, seed=1)
    write_prompts(folder / "code.jsonl", "code", 6, seed=2)
    return folder


def tiny_recipe(inputs: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """A recipe over :func:`make_inputs`'s files, as plain values; ``changes`` are dotted keys with ``__`` for dots."""
    recipe: dict[str, Any] = {
        "run": {"name": "tiny", "dir": str(run_dir), "steps": 4, "device": "cpu", "collective_timeout": 60.0},
        "student": {"checkpoint": str(inputs / "student"), "vocab_multiple": 4},
        "teachers": {name: {"checkpoint": str(inputs / name), "vocab_multiple": 4} for name in ("math", "code")},
        "data": {
            "train": [{"path": str(inputs / f"{name}.jsonl")} for name in ("math", "code")],
            "max_prompt_tokens": 16,
        },
        "rollout": {"prompts_per_step": 4, "max_new_tokens": 6},
        "metrics": {"console": False},
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        section = recipe
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return recipe


def write_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    """The recipe as YAML."""
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def train(inputs: Path, run_dir: Path, *overrides: str, **changes: Any) -> int:
    """Exit code of the training command, in this process, on :func:`tiny_recipe`; the recipe lies beside the run."""
    from fire_megatron.cli.train import main

    recipe = write_recipe(run_dir.with_suffix(".yaml"), tiny_recipe(inputs, run_dir, **changes))
    return main(["--recipe", str(recipe), *overrides])
