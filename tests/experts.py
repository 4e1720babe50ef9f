"""For the tests of mixtures of experts: small models, rows and a student in any layout."""

from __future__ import annotations

from typing import Any

import torch
from models import VOCABULARY
from roles import Roles, Spec, hf_response_logits, layouts, log_prob_and_entropy, reference
from steps import make_rollouts, make_training_rows

from fire_megatron.config.loss import LossConfig
from fire_megatron.config.schema import FP8Config, OptimizerConfig, PrecisionConfig
from fire_megatron.data.rollouts import TrainingRows
from fire_megatron.metrics.values import reduce_metrics
from fire_megatron.parallel.grid import Layout, ModelGrid
from fire_megatron.parallel.reducer import Reducer
from fire_megatron.train.student import Student

SPEC = Spec("qwen3-moe", changes=(("num_hidden_layers", 2),))
MIXED = Spec("qwen3-moe-mixed", changes=(("num_hidden_layers", 2),))
"""Its second layer is dense, which of two pipeline stages is one without a router."""
ROWS = 5
AUXILIARY = {"moe_aux_loss_coeff": 0.3, "moe_z_loss_coeff": 0.02}


def expert_layouts(size: int) -> list[Layout]:
    """Tensor x pipeline x context x expert splits, by expert size: the last spreads experts widest, the one before it
    splits sequences too. Of 2 ranks all, of 4 those with experts on several ranks and one more."""
    every = layouts(size, pipelines=(1, 2), contexts=(2, 1), experts=(1, 2, 4))
    every = [layout for layout in every if size < 4 or layout.expert > 1 or layout.data * layout.context == 1]
    return sorted(every, key=lambda layout: layout.expert)


def draw_rows(count: int = ROWS) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Prompts and responses; odd lengths, so that sequence parallelism pads, and one response of a single token."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(6, VOCABULARY, (3 + 2 * i,), generator=generator) for i in range(count)]
    responses = [torch.randint(6, VOCABULARY, (1 + (5 * i) % 9,), generator=generator) for i in range(count)]
    return prompts, responses


def training_rows(mine: Any, count: int = ROWS, spec: Spec = SPEC) -> TrainingRows:
    """This replica's rows, with made-up teacher log-probabilities; the rollout's are the student's own."""
    prompts, responses = draw_rows(count)
    generator = torch.Generator().manual_seed(4)
    teacher = [-4.0 - torch.rand(len(r), generator=generator) for r in responses]
    own = [
        log_prob_and_entropy(hf_response_logits(reference(spec), p, r), r)[0].float()
        for p, r in zip(prompts, responses, strict=True)
    ]
    return make_training_rows(make_rollouts(mine, prompts, responses, own), teacher)


def make_student(
    roles: Roles,
    layout: Layout,
    *,
    distributed: bool = False,
    micro_batch_size: int = 1,
    megatron: dict[str, Any] = AUXILIARY,
    source: Any = SPEC,
    dtype: str = "float32",
    fp8: FP8Config | None = None,
) -> tuple[Student, ModelGrid]:
    """This rank's part of a student, with the auxiliary losses on; ``distributed`` is the optimizer's."""
    model, grid = roles.build(source, layout, vocab_multiple=4, megatron=megatron, dtype=dtype, fp8=fp8)
    model.used_vocab_size = VOCABULARY
    settings = OptimizerConfig(
        lr=1e-3, eps=1e-3, weight_decay=0.1, clip_grad=0.5, micro_batch_size=micro_batch_size, distributed=distributed
    )
    student = Student(
        model, grid, loss=LossConfig(hooks=()), optimizer=settings, precision=PrecisionConfig(dtype=dtype)
    )
    return student, grid


def run_step(student: Student, grid: ModelGrid, count: int = ROWS, spec: Spec = SPEC) -> dict[str, float]:
    """Accumulate the gradients of one update; returns the reduced metrics."""
    # An update's rows are the same on all context ranks of a replica.
    rows = training_rows(range(grid.dp_rank, count, grid.layout.data), count, spec)
    tokens = student.count_tokens(rows, Reducer(grid.pg.dp))
    return reduce_metrics(student.accumulate_gradients(rows, tokens=tokens), group=grid.span)
