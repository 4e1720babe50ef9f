"""Whether two checkpoint folders hold one model, wherever they are, without reading the weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from fire_megatron.checkpoint.checksums import CHECKSUMS, reading
from fire_megatron.config.checkpoints import WEIGHTS, read_json_object
from fire_megatron.config.hf_config import read_hf_config

_PIECE = 64 * 1024


def model_fingerprint(folder: str | Path) -> str:
    """SHA-256 of a converted checkpoint's architecture and weights: of their checksums, or in a folder from elsewhere,
    which has none, of the beginning, middle and end of each file. What config.json says besides, such as where answers
    end, may be corrected.

    Raises:
        CheckpointError: a file cannot be read.
    """
    with reading(f"{folder}:"):
        return _fingerprint(Path(folder))


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256(_text(asdict(read_hf_config(folder))))
    chunks = (read_json_object(folder / WEIGHTS / CHECKSUMS) or {}).get("chunks")
    if chunks:
        digest.update(_text(chunks))
        return digest.hexdigest()
    for path in sorted((folder / WEIGHTS).glob("*")):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for start in (0, max(0, size // 2 - _PIECE // 2), max(0, size - _PIECE)):
                file.seek(start)
                digest.update(file.read(_PIECE))
    return digest.hexdigest()


def _text(values: object) -> bytes:
    return json.dumps(values, sort_keys=True).encode()
