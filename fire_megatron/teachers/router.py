"""The router: each row to the teacher that its label names, each answer back to its row."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fire_megatron.data.rollouts import Rollouts, Scores
from fire_megatron.parallel.collectives import all_gather_rows
from fire_megatron.parallel.grid import ModelGrid
from fire_megatron.platform import compute_device
from fire_megatron.teachers.teacher import Teacher


@dataclass(frozen=True)
class _Gathered:
    """All rows of the step, in the order of their ids."""

    row_ids: list[int]
    teachers: list[int]
    prompts: list[torch.Tensor]
    responses: list[torch.Tensor]


class TeacherRouter:
    """Scores rollouts with several teachers that live on the student's ranks."""

    def __init__(self, teachers: Mapping[str, Teacher], route: Mapping[str, str], *, student_grid: ModelGrid) -> None:
        """Args: teachers: by name; route: label -> teacher name; student_grid: how the rollouts are shared out."""
        self.teachers = dict(teachers)
        self.names = tuple(sorted(self.teachers))
        self.route = dict(route)
        self.student_grid = student_grid
        self.seconds: dict[str, float] = {}
        """Seconds each teacher took in the last call."""

    def score(self, rollouts: Rollouts, *, progress: Callable[[str], None] | None = None) -> Scores:
        """Score this replica's rollouts; every rank of the student's grid calls it with its own.

        Each row's tokens go to one teacher only, whose replicas share the rows by token count, and the result
        comes back in the order of ``rollouts``. ``progress`` is told the name of each teacher that starts.
        """
        rows = self._gather(rollouts)
        results: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for index, name in enumerate(self.names):
            started = time.perf_counter()
            mine = [i for i, teacher in enumerate(rows.teachers) if teacher == index]
            if mine and progress:
                progress(name)
            if mine:
                scored = self.teachers[name].score([rows.prompts[i] for i in mine], [rows.responses[i] for i in mine])
                results |= {rows.row_ids[i]: pair for i, pair in zip(mine, zip(*scored, strict=True), strict=True)}
            self.seconds[name] = time.perf_counter() - started
        return Scores(
            teachers=tuple(self.route[label] for label in rollouts.labels),
            log_probs=tuple(results[row][0] for row in rollouts.row_ids),
            entropies=tuple(results[row][1] for row in rollouts.row_ids),
        )

    def _gather(self, rollouts: Rollouts) -> _Gathered:
        """Every replica's rows, sorted by row id so that all layouts score the same packs."""
        group, device = self.student_grid.pg.dp, compute_device()
        headers = [
            torch.tensor([row, self.names.index(self.route[label])])
            for row, label in zip(rollouts.row_ids, rollouts.labels, strict=True)
        ]
        columns = [
            all_gather_rows(column, dtype=torch.int64, device=device, group=group)
            for column in (headers, rollouts.prompt_tokens, rollouts.responses)
        ]
        order = sorted(range(len(columns[0])), key=lambda i: int(columns[0][i][0]))
        headers, prompts, responses = ([column[i] for i in order] for column in columns)
        return _Gathered([int(h[0]) for h in headers], [int(h[1]) for h in headers], prompts, responses)
