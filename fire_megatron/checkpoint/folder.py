"""What surrounds the weights in a checkpoint folder, and how a folder comes into being whole or not at all.

A checkpoint folder holds ``config.json`` and the tokenizer as published, ``weights/`` in torch_dist format, and
``fire_checkpoint.json``, which is written last and so marks the folder as complete.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fire_megatron.config.errors import CheckpointError

MARKER = "fire_checkpoint.json"
WEIGHTS = "weights"
_CARRIED = (
    "config.json", "generation_config.json", "tokenizer*", "*.model", "vocab.*", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template*", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


def carry_files(source: Path, target: Path) -> None:
    """Copy configuration, tokenizer and licence files (not weights) from one checkpoint folder to another."""
    for path in sorted(source.iterdir()):
        if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in _CARRIED):
            shutil.copyfile(path, target / path.name)


def read_marker(folder: Path) -> dict[str, Any] | None:
    """The marker of a complete checkpoint of ours, or None where there is none."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and (folder / WEIGHTS / ".metadata").is_file() else None


def require_checkpoint(directory: str | Path) -> Path:
    """The folder, once it is known to be a complete checkpoint of ours.

    Raises:
        CheckpointError: it is missing, incomplete, a Hugging Face folder, or a folder of checkpoints; the message
            says what to give instead.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    if read_marker(folder) is not None:
        return folder
    steps = sorted(path.name for path in folder.glob("step_*") if read_marker(path) is not None)
    if steps:
        raise CheckpointError(
            f"{folder}: holds several checkpoints; give one of them, for example {folder / steps[-1]}"
        )
    if any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder}: is a Hugging Face checkpoint; convert it first: "
            f"fire-megatron convert hf-to-megatron --hf {folder} --out {folder}-megatron"
        )
    raise CheckpointError(f"{folder}: is not a complete checkpoint ({MARKER} or {WEIGHTS}/.metadata is missing)")


def check_target(target: Path, *, overwrite: bool, is_ours: Callable[[Path], bool], what: str) -> None:
    """Refuse to write over something.

    Args:
        target: the folder to be made.
        overwrite: whether a folder of the same kind may be replaced.
        is_ours: tells that kind from anything else.
        what: the kind, for messages.

    Raises:
        CheckpointError: the target exists and may not be replaced.
    """
    if not target.exists():
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    if not target.is_dir() or not is_ours(target):
        raise CheckpointError(f"{target}: exists and is not {what}, so it is left alone; choose another --out")
    if not overwrite:
        raise CheckpointError(f"{target}: already holds {what}; pass --overwrite to replace it")
