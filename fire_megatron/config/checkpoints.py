"""What the JSON files of a checkpoint folder tell without torch: is it ours and complete."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fire_megatron.config.errors import CheckpointError
from fire_megatron.config.schema import Recipe

MARKER = "fire_checkpoint.json"
"""Written last into a converted checkpoint, so that a folder that has it is complete."""
WEIGHTS = "weights"
"""Folder of megatron's torch_dist files in it."""
_METADATA = Path(WEIGHTS, ".metadata")
"""Their index."""


def read_marker(folder: Path) -> dict[str, Any] | None:
    """The marker of a complete checkpoint of ours, or None where there is none."""
    return read_json_object(folder / MARKER) if (folder / _METADATA).is_file() else None


def checkpoint_folder(recipe: Recipe) -> Path:
    """Where a run's checkpoints are."""
    return Path(recipe.checkpoint.dir or Path(recipe.run.dir) / "checkpoints")


def read_json_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None when there is no such file or it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def is_hf_folder(folder: Path) -> bool:
    """Whether a folder holds a Hugging Face model."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def holds_model(folder: Path) -> bool:
    """Whether a folder holds a model of either kind, complete or not."""
    return (folder / MARKER).exists() or (folder / WEIGHTS / _METADATA.name).exists() or is_hf_folder(folder)


def adapter_problem(folder: Path) -> str | None:
    """What to do with a folder that holds a PEFT adapter; None where it holds none."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return None
    base = (read_json_object(path) or {}).get("base_model_name_or_path") or "its base model"
    return (
        f"{folder} holds a PEFT adapter (adapter_config.json), which is no model without {base}; merge them "
        "(peft: AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(OUT)), add its "
        "tokenizer and give OUT"
    )


def checkpoint_problem(folder: Path) -> str | None:
    """Why a folder is no converted checkpoint and what to give instead; None when it is one."""
    if not folder.exists():
        where = f"{folder} does not exist{looked_in(folder)}"
        return f"{where}; convert a Hugging Face model or correct the path{download(folder)}"
    if not folder.is_dir():
        return f"{folder} is a file; give the folder of a converted checkpoint"
    if read_marker(folder) is not None:
        return None
    adapter = adapter_problem(folder)
    if adapter:
        return adapter
    if is_hf_folder(folder) and not (folder / MARKER).exists():
        converted = folder.with_name(f"{folder.name}-megatron")
        if read_marker(converted) is not None:
            return f"{folder} is a Hugging Face folder; give the checkpoint converted from it, {converted}"
        command = f"fire-megatron convert hf-to-megatron --hf {folder} --out {converted}"
        return f"{folder} is a Hugging Face folder and must be converted first: {command}"
    inside = sorted(path.name for path in folder.glob("*") if path.is_dir() and read_marker(path) is not None)
    if inside:
        return f"{folder} holds several checkpoints; give one of them, for example {folder / inside[-1]}"
    return f"{folder} is not a complete checkpoint ({MARKER} or {_METADATA} is missing or damaged); convert it again"


def require_checkpoint(folder: Path) -> None:
    """Raises CheckpointError: the folder is no converted checkpoint; says what to give instead."""
    problem = checkpoint_problem(folder)
    if problem:
        raise CheckpointError(problem)


def looked_in(path: Path) -> str:
    """Where a relative path was looked for, for messages; empty for an absolute one."""
    return "" if path.is_absolute() else f" (looked in {Path.cwd()})"


def download(folder: Path) -> str:
    """How to get a model of the Hugging Face hub whose name stands in a folder's place; empty where it looks like none.
    For the end of messages."""
    if folder.is_absolute() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(folder)):
        return ""
    command = f"hf download {folder} --local-dir {folder.name}"
    return f"; a model of the Hugging Face hub has to be downloaded first: {command}"
