"""What the JSON files of a checkpoint folder tell without torch: is it ours and complete, and which model is it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MARKER = "fire_checkpoint.json"
"""Written last into a converted checkpoint, so that a folder that has it is complete."""
_METADATA = Path("weights", ".metadata")
"""The index of megatron's torch_dist files."""


def read_json_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None when there is no such file or it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def is_converted(folder: Path) -> bool:
    """Whether the folder is a complete checkpoint of ours."""
    return read_json_object(folder / MARKER) is not None and (folder / _METADATA).is_file()


def checkpoint_problem(folder: Path) -> str | None:
    """Why a folder cannot be loaded as a converted checkpoint and what to give instead; None when it can."""
    if not folder.exists():
        return f"{folder} does not exist{looked_in(folder)}; convert a Hugging Face model or correct the path"
    if not folder.is_dir():
        return f"{folder} is a file; give the folder of a converted checkpoint"
    if is_converted(folder):
        if read_json_object(folder / "config.json") is None:
            return f"{folder / 'config.json'} is missing or is not a JSON object; convert the model again"
        return None
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")) and not (folder / MARKER).exists():
        converted = folder.with_name(f"{folder.name}-megatron")
        if is_converted(converted):
            return f"{folder} is a Hugging Face folder; give the checkpoint converted from it, {converted}"
        command = f"fire-megatron convert hf-to-megatron --hf {folder} --out {converted}"
        return f"{folder} is a Hugging Face folder and must be converted first: {command}"
    inside = sorted(path.name for path in folder.glob("*") if path.is_dir() and is_converted(path))
    if inside:
        return f"{folder} holds several checkpoints; give one of them, for example {folder / inside[-1]}"
    return f"{folder} is not a complete checkpoint ({MARKER} or {_METADATA} is missing or damaged); convert it again"


def looked_in(path: Path) -> str:
    """Where a relative path was looked for, for messages; empty for an absolute one."""
    return "" if path.is_absolute() else f" (looked in {Path.cwd()})"
