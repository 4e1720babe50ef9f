"""The model to evaluate: a converted checkpoint, a step of a run, or a Hugging Face folder."""

from __future__ import annotations

import fnmatch
import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from fire_megatron.checkpoint.convert import hf_to_megatron, open_hf
from fire_megatron.checkpoint.whole import open_whole
from fire_megatron.config.checkpoints import WEIGHTS, require_checkpoint
from fire_megatron.config.hf_config import ModelShape, read_hf_config

_PIECE = 64 * 1024
_ANSWERS_DEPEND_ON = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


@dataclass(frozen=True)
class Source:
    """A model on the disk."""

    folder: Path
    is_hf: bool
    shape: ModelShape
    fingerprint: str
    """Of weights, configuration and tokenizer; the same wherever the folder is."""

    def converted(self, target: Path) -> None:
        """Convert a Hugging Face model into ``target``; a converted one is used where it is.

        Raises:
            CheckpointError: it cannot be converted, or ``target`` cannot be written.
        """
        if self.is_hf:
            shutil.rmtree(target, ignore_errors=True)  # of a run that was killed
            hf_to_megatron(self.folder, target, progress=True)


def open_source(folder: str | Path, *, is_hf: bool) -> Source:
    """Look at a model's files without reading its weights.

    Raises:
        UserError: it is not there, not whole, or of an architecture that is not supported.
    """
    path = Path(folder)
    if is_hf:
        shape, _ = open_hf(path)
    else:
        require_checkpoint(path)
        shape = read_hf_config(path)
        open_whole(path, shape)
    return Source(path, is_hf, shape, _fingerprint(path))


def _fingerprint(folder: Path) -> str:
    """SHA-256 of names, sizes and contents; of large files their beginning, middle and end, which no two steps of a
    training have in common."""
    digest = hashlib.sha256()
    files = [p for p in folder.iterdir() if any(fnmatch.fnmatch(p.name, pattern) for pattern in _ANSWERS_DEPEND_ON)]
    files += (folder / WEIGHTS).glob("*") if (folder / WEIGHTS).is_dir() else ()
    for path in sorted(path for path in files if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}\0{size}\0".encode())
        with path.open("rb") as file:
            for start in (0, max(0, size // 2 - _PIECE), max(0, size - _PIECE)):
                file.seek(start)
                digest.update(file.read(_PIECE))
    return digest.hexdigest()
