"""For the distributed tests: small models as megatron roles in any layout, and what transformers says of the same
weights."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import make_hf, save_megatron

from fire_megatron import platform
from fire_megatron.checkpoint.load import load_weights
from fire_megatron.config.schema import ParallelConfig, RoleConfig, StudentConfig
from fire_megatron.models.build import build_model
from fire_megatron.models.gpt import FireGPT
from fire_megatron.models.hf_config import read_hf_config
from fire_megatron.parallel.grid import GridFactory, Layout, ModelGrid
from fire_megatron.teachers.pool import TeacherPool
from fire_megatron.teachers.router import TeacherRouter
from fire_megatron.teachers.teacher import Teacher


def make_router(
    teachers: dict[str, Teacher], route: dict[str, str], grid: ModelGrid, factory: GridFactory, **options: Any
) -> TeacherRouter:
    """A router to teachers that all ranks hold."""
    infos = {name: teacher.info for name, teacher in teachers.items()}
    pool = TeacherPool(infos, teachers, student_grid=grid, factory=factory)
    return TeacherRouter(pool, route, student_grid=grid, **options)


def share(value: Any) -> Any:
    """Rank 0's value on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def layouts(
    size: int,
    *,
    tensors: tuple[int, ...] = (1, 2),
    pipelines: tuple[int, ...] = (1, 2, 3, 4),
    contexts: tuple[int, ...] = (1,),
) -> list[Layout]:
    """Every tensor x pipeline x context split of the world; data parallelism takes the rest."""
    return [
        Layout(tensor=t, pipeline=p, context=c, num_ranks=size)
        for c, t, p in itertools.product(contexts, tensors, pipelines)
        if size % (t * p * c) == 0
    ]


def parallel_config(layout: Layout, *, sequence: bool | None = None) -> ParallelConfig:
    """The recipe's section for a layout."""
    return ParallelConfig(layout.tensor, layout.pipeline, layout.context, layout.expert, sequence)


def load_role(path: str | Path, role: RoleConfig, grid: ModelGrid, world: platform.World) -> FireGPT:
    """This rank's part of a model, built and loaded from a converted checkpoint."""
    model = build_model(read_hf_config(path), role, grid, device=world.device)
    load_weights(model, path, grid=grid)
    return model


@dataclass(frozen=True)
class Spec:
    """A random model: its family, seed and changes to the family's config."""

    family: str
    seed: int = 0
    changes: tuple[tuple[str, Any], ...] = ()

    def hf(self) -> Any:
        """The transformers model; every rank makes the same."""
        return make_hf(self.family, seed=self.seed, **dict(self.changes))


class Roles:
    """Builds roles. Every rank calls it alike; checkpoints are converted once, by rank 0."""

    def __init__(self, world: platform.World, folder: Path) -> None:
        """Args: folder: one that all ranks see."""
        self.world, self.folder = world, folder
        self.factory = GridFactory(timeout=60)
        self._checkpoints: dict[Spec, Path] = {}

    def checkpoint(self, spec: Spec) -> Path:
        """The converted checkpoint of a model."""
        if spec not in self._checkpoints:
            path = self.folder / str(len(self._checkpoints))
            if self.world.is_main:
                save_megatron(spec.family, path, seed=spec.seed, **dict(spec.changes))
            dist.barrier()
            self._checkpoints[spec] = path
        return self._checkpoints[spec]

    def build(
        self, model: Spec | Path, layout: Layout, *, sequence: bool | None = None, vocab_multiple: int = 128
    ) -> tuple[FireGPT, ModelGrid]:
        """This rank's part of a model (or of a converted checkpoint), loaded."""
        path = self.checkpoint(model) if isinstance(model, Spec) else model
        grid = self.factory.grid(layout)
        role = StudentConfig(
            checkpoint=str(path),
            parallel=parallel_config(layout, sequence=sequence),
            vocab_multiple=vocab_multiple,
        )
        return load_role(path, role, grid, self.world), grid


@cache
def reference(spec: Spec) -> Any:
    """The transformers model, made once a process."""
    return spec.hf()


def hf_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """[L] token ids -> [L, vocabulary] logits of one unpadded row, as transformers computes them."""
    with torch.no_grad():
        return model(tokens[None]).logits[0]


def hf_response_logits(model: Any, prompt: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
    """[R, vocabulary] logits that transformers predicts each response token from."""
    return hf_logits(model, torch.cat((prompt, response)))[len(prompt) - 1 : -1]


def log_prob_and_entropy(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense float64 log-softmax at ``tokens`` and entropy of the full softmax, by their definitions. [R] each."""
    log_p = logits.double().log_softmax(-1)
    return log_p.gather(-1, tokens[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)
