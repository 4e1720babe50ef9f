"""What surrounds the weights in a checkpoint folder.

A checkpoint folder holds ``config.json`` and the tokenizer as published, ``weights/`` in torch_dist format, and
``fire_checkpoint.json``, which is written last and so marks the folder as complete.
"""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Callable
from pathlib import Path

from fire_megatron.config.errors import CheckpointError

_CARRIED = (
    "config.json", "generation_config.json", "tokenizer*", "*.model", "vocab.*", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template*", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
_TEMPLATES = "additional_chat_templates"


def carry_files(source: Path, target: Path) -> None:
    """Copy configuration, tokenizer, templates and licences (not weights) from one checkpoint folder to another."""
    for path in sorted(source.iterdir()):
        if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in _CARRIED):
            shutil.copyfile(path, target / path.name)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, target / _TEMPLATES)


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
