"""What the launcher's variables say, without torch, whose import takes seconds."""

from __future__ import annotations

import contextlib
import os

from fire_megatron.config.errors import LayoutError


def variable(*names: str, default: int) -> int:
    """The first of these environment variables that is set, as an integer."""
    for name in names:
        value = os.environ.get(name)
        if value is not None:
            try:
                return int(value)
            except ValueError:
                raise LayoutError(f"environment variable {name}={value!r} is not a whole number") from None
    return default


def launched_world_size() -> int:
    """World size the launcher announces, before any process group exists. In an sbatch script itself, outside srun,
    Slurm tells of tasks that have not been started; only srun sets the number of a step."""
    return variable("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", default=1)


def launched_rank() -> int:
    """Global rank the launcher announces."""
    return variable("RANK", "SLURM_PROCID", default=0)


def report_mistake(text: str) -> None:
    """Let the script that started this process know of an error that another start would meet again, in the file that
    it has named; exit codes do not come through torchrun."""
    path = os.environ.get("FIRE_MEGATRON_MISTAKE")
    if path:
        with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as stream:
            stream.write(f"{text}\n")
