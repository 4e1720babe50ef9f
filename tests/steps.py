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
from fire_megatron.data.rollouts import Rollouts, Target, TrainingRows
from fire_megatron.parallel.grid import ModelGrid
from fire_megatron.train.student import Student

ROWS = 9
TEACHERS = ("math", "code")
ROUTE = {"math": "math", "algebra": "math", "code": "code"}


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


def make_rollouts(
    mine: Sequence[int],
    prompts: Sequence[Prompt | torch.Tensor],
    responses: Sequence[torch.Tensor],
    log_probs: Sequence[torch.Tensor] | None = None,
    entropies: Sequence[torch.Tensor] | None = None,
) -> Rollouts:
    """The rows ``mine`` of a batch, in that order; statistics are 1 where none are given, bare prompts math's."""
    ones = [torch.ones(len(response)) for response in responses]
    log_probs, entropies = log_probs or ones, entropies or ones
    told = [p if isinstance(p, Prompt) else Prompt(i, "math", tuple(p.tolist()), "") for i, p in enumerate(prompts)]
    columns = (told, responses, log_probs, entropies, [False] * len(told))
    return Rollouts(tuple(mine), *(tuple(column[i] for i in mine) for column in columns), weight_version=0)


def make_training_rows(rollouts: Rollouts, teacher: Sequence[torch.Tensor]) -> TrainingRows:
    """Rollouts with the whole batch's log-probabilities of the math teacher, and weights of 1."""
    weights = tuple(torch.ones(len(response)) for response in rollouts.responses)
    targets = (Target(("math",), (1.0,)),) * len(rollouts)
    return TrainingRows(rollouts, targets, tuple(teacher[i] for i in rollouts.row_ids), weights)


def rollouts_of(mine: Sequence[int], mixed: bool = False) -> Rollouts:
    """This replica's rows, with made-up rollout statistics."""
    prompts, responses = rows(mixed)
    generator = torch.Generator().manual_seed(4)
    noise = [torch.rand(len(r), generator=generator) for r in responses]
    return make_rollouts(mine, prompts, responses, [-3.0 - x for x in noise], [1.0 + x for x in noise])


def save_state(student: Student, grid: ModelGrid, *, source: Path, checkpoints: Path, step: int = 1) -> Path:
    """Save a student's state as a step of a run; returns the step's folder. Collective over the grid."""
    saver = Saver(checkpoints, source=source, keep=1, grid=grid)
    saver.save(step, student.model, student.optimizer, rng={}, extra={})
    return step_folder(checkpoints, step)
