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

from fire_megatron.checkpoint.loading import load_weights
from fire_megatron.checkpoint.optimizer_state import own_slice, state_names, steps_taken
from fire_megatron.checkpoint.shards import model_shards
from fire_megatron.config.hf_config import read_hf_config
from fire_megatron.config.schema import FP8Config, ParallelConfig, PrecisionConfig, RoleConfig, StudentConfig
from fire_megatron.models.build import build_model
from fire_megatron.models.gpt import FireGPT
from fire_megatron.parallel.grid import GridFactory, Layout, ModelGrid
from fire_megatron.platform import launch
from fire_megatron.train.student import Student


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
    experts: tuple[int, ...] = (1,),
) -> list[Layout]:
    """Every tensor x pipeline x context split of the world; data parallelism takes the rest. Expert parallelism splits
    what is left for context and data."""
    return [
        Layout(tensor=t, pipeline=p, context=c, expert=e, num_ranks=size)
        for c, t, p, e in itertools.product(contexts, tensors, pipelines, experts)
        if size % (t * p * c) == 0 and size % (t * p * e) == 0
    ]


def telling_layouts(size: int, **options: Any) -> list[Layout]:
    """The layouts that say something: of 2 ranks each dimension alone, of 4 each two of them together, data parallelism
    being one of them."""
    every = layouts(size, **{"pipelines": (1, 2, 3), "contexts": (1, 2), **options})
    return every if size % 4 else [layout for layout in every if layout.data < size or layout.expert > 1]


def expert_sizes(family: str, size: int) -> tuple[int, ...]:
    """Expert-parallel sizes of a family: on 4 ranks beside another split."""
    return (1,) if "moe" not in family else (1, 2) if size < 4 else (2,)


def parallel_config(layout: Layout, *, sequence: bool | None = None) -> ParallelConfig:
    """The recipe's section for a layout."""
    return ParallelConfig(layout.tensor, layout.pipeline, layout.context, layout.expert, sequence)


def load_role(path: str | Path, role: RoleConfig, grid: ModelGrid, world: launch.World) -> FireGPT:
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


_CHECKPOINTS: dict[Path, dict[Spec, Path]] = {}
"""What is converted, by folder."""


class Roles:
    """Builds roles. Every rank calls it alike; checkpoints are converted once, by rank 0."""

    def __init__(self, world: launch.World, folder: Path) -> None:
        """Args: folder: one that all ranks see."""
        self.world, self.folder = world, folder
        self.factory = GridFactory(timeout=60)

    def checkpoint(self, spec: Spec) -> Path:
        """The converted checkpoint of a model."""
        made = _CHECKPOINTS.setdefault(self.folder, {})
        if spec not in made:
            path = self.folder / str(len(made))
            if self.world.is_main:
                save_megatron(spec.family, path, seed=spec.seed, **dict(spec.changes))
            dist.barrier()
            made[spec] = path
        return made[spec]

    def build(
        self,
        model: Spec | Path,
        layout: Layout,
        *,
        sequence: bool | None = None,
        vocab_multiple: int = 128,
        megatron: dict[str, Any] | None = None,
        dtype: str = "float32",
        fp8: FP8Config | None = None,
    ) -> tuple[FireGPT, ModelGrid]:
        """This rank's part of a model (or of a converted checkpoint), loaded."""
        path = self.checkpoint(model) if isinstance(model, Spec) else model
        grid = self.factory.grid(layout)
        role = StudentConfig(
            checkpoint=str(path),
            parallel=parallel_config(layout, sequence=sequence),
            vocab_multiple=vocab_multiple,
            megatron=megatron or {},
            precision=PrecisionConfig(dtype=dtype, fp8=fp8),
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


def _put_together(parts: list[tuple], grid: ModelGrid) -> dict[Any, torch.Tensor]:
    """Every rank's (name, shape of the whole, offset, part) as whole tensors by name, on every rank of the grid."""
    gathered: list[Any] = [None] * grid.span.size()
    dist.all_gather_object(gathered, parts, group=grid.span)
    whole: dict[Any, torch.Tensor] = {}
    for name, shape, offset, part in itertools.chain(*gathered):
        target = whole.setdefault(name, torch.full(shape, float("nan")))
        view = target[tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))]
        view.copy_(torch.where(torch.isnan(part), view, part))
    assert not any(torch.isnan(tensor).any() for tensor in whole.values()), "a part is nowhere"
    return whole


def whole_gradients(student: Student, grid: ModelGrid) -> dict[str, torch.Tensor]:
    """Every gradient of the whole model by checkpoint key, put together on the student's ranks."""
    parts = []
    for shard in model_shards(student.model, grid=grid):
        if shard.writes and shard.replicas.rank() == 0:
            gradient = shard.real(shard.within(shard.parameter.main_grad)).clone()
            parts.append((shard.key, shard.global_shape, shard.offset, gradient))
    return _put_together(parts, grid)


def whole_state(student: Student, grid: ModelGrid) -> tuple[dict[tuple[str, str], torch.Tensor], set[int]]:
    """Weights and optimizer state of the whole model by kind and checkpoint key, put together from all ranks, and
    Adam's count of updates on every rank."""
    parts = []
    for shard in model_shards(student.model, grid=grid):
        weight = shard.real(shard.view).detach().clone()
        parts.append((("weight", shard.key), shard.global_shape, shard.offset, weight))
        mine = own_slice(student.optimizer, shard.parameter)
        for name in state_names(shard.parameter) if mine.tensors else ():
            flat = torch.full((shard.parameter.numel(),), float("nan"))
            flat[mine.start : mine.end] = mine.tensors[name]
            part = shard.real(shard.within(flat.view(shard.parameter.shape))).clone()
            parts.append(((name, shard.key), shard.global_shape, shard.offset, part))
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, steps_taken(student.optimizer))
    return _put_together(parts, grid), set(counts)


def assert_same_state(ours: tuple, theirs: tuple, rel: float) -> None:
    """Compare two results of :func:`whole_state`; ``rel`` is relative to a tensor's largest value."""
    assert ours[1] == theirs[1] and len(theirs[1]) == 1
    assert ours[0].keys() == theirs[0].keys()
    apart = {key: float((ours[0][key] - value).abs().max() / value.abs().max()) for key, value in theirs[0].items()}
    assert max(apart.values()) <= rel, {key: value for key, value in apart.items() if value > rel}
