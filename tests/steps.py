"""One step's batch, made up alike on every rank, and what a step leaves, for the tests that compare layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from models import VOCABULARY, save_megatron

from fire_megatron.checkpoint.saving import Saver
from fire_megatron.checkpoint.steps import step_folder
from fire_megatron.data.records import Prompt
from fire_megatron.data.rollouts import Rollouts
from fire_megatron.parallel.grid import ModelGrid
from fire_megatron.train.student import Student

ROWS = 9
ROUTE = {"math": "math", "code": "code"}


def write_checkpoints(folder: Path) -> None:
    """A student and two teachers of other depth and width; the code teacher's vocabulary has unused entries at the end,
    as models of one family do."""
    save_megatron("qwen3", folder / "student", num_hidden_layers=3)
    save_megatron("qwen2", folder / "tied", num_hidden_layers=3, vocab_size=340)
    save_megatron("qwen3", folder / "math", seed=1, num_hidden_layers=5)
    save_megatron("llama", folder / "code", seed=2, hidden_size=96, num_hidden_layers=2, vocab_size=320)


def rows(mixed: bool = False) -> tuple[list[Prompt], list[torch.Tensor]]:
    """Prompts and fixed responses of the global batch; one response is a single token. With ``mixed``, some rows learn
    from both teachers, with different weights."""
    generator = torch.Generator().manual_seed(3)

    def draw(n: int) -> torch.Tensor:
        return torch.randint(6, VOCABULARY, (n,), generator=generator)

    prompts = [Prompt(i, ("math", "code")[i % 2], tuple(draw(3 + i).tolist()), "") for i in range(ROWS)]
    for i, share in {2: 0.25, 5: 0.5, 7: 0.9}.items() if mixed else ():
        prompts[i] = replace(prompts[i], label="code+math", mixture=(("code", share), ("math", 1 - share)))
    return prompts, [draw(1 + (5 * i) % 13) for i in range(ROWS)]


def rollouts_of(mine: Sequence[int], mixed: bool = False) -> Rollouts:
    """This replica's rows, with made-up rollout statistics."""
    prompts, responses = rows(mixed)
    generator = torch.Generator().manual_seed(4)
    noise = [torch.rand(len(r), generator=generator) for r in responses]
    return Rollouts(
        row_ids=tuple(mine),
        prompts=tuple(prompts[i] for i in mine),
        responses=tuple(responses[i] for i in mine),
        log_probs=tuple(-3.0 - noise[i] for i in mine),
        entropies=tuple(1.0 + noise[i] for i in mine),
        truncated=tuple(False for _ in mine),
        weight_version=0,
    )


def save_state(student: Student, grid: ModelGrid, *, source: Path, checkpoints: Path, step: int = 1) -> Path:
    """Save a student's state as a step of a run; returns the step's folder. Collective over the grid."""
    saver = Saver(checkpoints, source=source, keep=1, grid=grid)
    saver.save(step, student.model, student.optimizer, rng={}, extra={})
    return step_folder(checkpoints, step)
