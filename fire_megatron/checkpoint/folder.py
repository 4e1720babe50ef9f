"""What surrounds the weights in a checkpoint folder.

A checkpoint folder holds ``config.json`` and the tokenizer as published, ``weights/`` in torch_dist format, and
``fire_checkpoint.json``, which is written last and so marks the folder as complete.
"""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Callable
from pathlib import Path

from fire_megatron.config.checkpoints import (
    adapter_problem,
    is_hf_folder,
    read_json_object,
    read_marker,
    require_checkpoint,
)
from fire_megatron.config.errors import CheckpointError
from fire_megatron.config.hf_config import ModelShape, read_hf_config
from fire_megatron.config.quantization import Fp8Blocks, fp8_blocks

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


def read_hf_folder(folder: Path) -> tuple[ModelShape, Fp8Blocks | None]:
    """The architecture of a Hugging Face folder, and the blocks of its FP8 weights; imports no torch.

    Raises:
        CheckpointError: it holds no model, or one of an architecture that is not supported.
    """
    problem = adapter_problem(folder)
    if problem:
        raise CheckpointError(problem)
    fp8 = fp8_blocks(read_json_object(folder / "config.json") or {})
    return read_hf_config(folder, quantized=fp8 is not None), fp8


def check_conversion(hf: Path, out: Path, *, overwrite: bool) -> None:
    """Whether a Hugging Face folder may be converted into ``out``, as far as that shows without torch.

    Raises:
        CheckpointError: the source is not of a supported architecture, or the target may not be written.
    """
    read_hf_folder(hf)
    check_target(out, overwrite=overwrite, is_ours=lambda p: read_marker(p) is not None, what="a converted checkpoint")


def check_export(checkpoint: Path, out: Path, *, overwrite: bool) -> ModelShape:
    """The architecture of a converted checkpoint that may be exported to ``out``; imports no torch.

    Raises:
        CheckpointError: the source is no complete checkpoint, or the target may not be written.
    """
    require_checkpoint(checkpoint)
    shape = read_hf_config(checkpoint)
    check_target(out, overwrite=overwrite, is_ours=is_hf_folder, what="a Hugging Face model")
    return shape
