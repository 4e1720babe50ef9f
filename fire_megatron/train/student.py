"""The student: the model under megatron-core's DDP and (distributed) optimizer, and its update.

Shapes: N response tokens of a micro-batch, V local vocabulary, R_i response tokens of row i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.utils import get_model_config

from fire_megatron.config.schema import LossConfig, OptimizerConfig, PrecisionConfig
from fire_megatron.data.packing import Pack, pack_rows, split_by_rows
from fire_megatron.data.rollouts import TrainingRows
from fire_megatron.losses.estimators import sampled_policy_gradient
from fire_megatron.losses.reduction import global_token_count, token_mean
from fire_megatron.losses.vocab_parallel import log_prob_and_entropy
from fire_megatron.metrics.values import Last, Mean, Value, merge
from fire_megatron.models.build import DTYPES
from fire_megatron.models.gpt import FireGPT
from fire_megatron.models.pipeline import run_pipeline
from fire_megatron.parallel.collectives import broadcast_flat
from fire_megatron.parallel.grid import ModelGrid
from fire_megatron.parallel.reducer import Reducer
from fire_megatron.platform import compute_device

_LOSS_METRICS = ("loss/clip_fraction", "loss/approx_kl", "rollout/importance_mean", "rollout/importance_cut")


@dataclass(frozen=True)
class _Targets:
    """Per-token inputs of the loss for one pack, [N] float32 each, in the pack's order."""

    teacher: torch.Tensor
    rollout: torch.Tensor
    weight: torch.Tensor
    old: torch.Tensor | None


def build_optimizer(
    model: DistributedDataParallel, config: OptimizerConfig, precision: PrecisionConfig, *, grid: ModelGrid
) -> MegatronOptimizer:
    """megatron-core's AdamW over this rank's parameters; biases and norms are not decayed."""
    dtype = DTYPES[precision.dtype]
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            params_dtype=dtype,
            bf16=dtype is torch.bfloat16,
            use_distributed_optimizer=model.ddp_config.use_distributed_optimizer,
        ),
        [model],
        use_gloo_process_groups=False,
        pg_collection=grid.pg,
    )
    for group in optimizer.param_groups:
        if "fused" in group:  # torch's Adam, where there is neither Transformer Engine nor apex
            group["fused"] = True  # one pass over memory instead of ten
    return optimizer


class Student:
    """Trains a model whose weights are loaded. Gradients are summed over micro-batches and data-parallel ranks;
    the loss function has already divided by the global token count."""

    def __init__(
        self,
        model: FireGPT,
        grid: ModelGrid,
        *,
        loss: LossConfig,
        optimizer: OptimizerConfig,
        precision: PrecisionConfig,
    ) -> None:
        """Args: model: this rank's stage. Collective over the grid."""
        self.model, self.grid, self.loss, self.settings = model, grid, loss, optimizer
        config = get_model_config(model)
        self.ddp = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                # A single replica has nobody to share with, and would copy all gradients and weights to itself.
                use_distributed_optimizer=optimizer.distributed and grid.pg.dp_cp.size() > 1,
                overlap_grad_reduce=False,
            ),
            model,
            pg_collection=grid.pg,
        )
        self.optimizer = build_optimizer(self.ddp, optimizer, precision, grid=grid)
        config.grad_scale_func = self.optimizer.scale_loss
        config.no_sync_func = self.ddp.no_sync
        config.finalize_model_grads_func = self._finalize_gradients

    def _finalize_gradients(self, model: list, num_tokens: object, *args: object, **kwargs: object) -> None:
        # The token count is dropped on purpose: dividing is the loss's business (losses/reduction.py).
        kwargs.pop("pg_collection", None)
        finalize_model_grads(model, None, pg_collection=self.grid.pg, **kwargs)

    def set_learning_rate(self, rate: float) -> None:
        """Set the rate of the next update."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_mult", 1.0)

    def packs(self, rows: TrainingRows) -> list[Pack]:
        """Micro-batches of this replica's rows, longest rows first; padding alone when it has none."""
        lengths = rows.rollouts.lengths
        order = sorted(range(len(rows)), key=lambda i: (-lengths[i], i))
        multiple = self.grid.layout.tensor if self.model.config.sequence_parallel else 1
        return [
            pack_rows(
                rows.rollouts.prompt_tokens, rows.rollouts.responses, batch, multiple=multiple, device=compute_device()
            )
            for batch in split_by_rows(order, self.settings.micro_batch_size) or [[]]
        ]

    def log_probs(self, rows: TrainingRows) -> list[torch.Tensor]:
        """The trainer's log-probabilities of the responses under the present weights: [R_i] float32 each."""
        packs = self.packs(rows)
        self.ddp.eval()
        with torch.no_grad():
            results = run_pipeline(self.ddp, packs, self._score, grid=self.grid, forward_only=True)
        self.ddp.train()
        sizes = [n for pack in packs for n in pack.response_lengths]
        flat = broadcast_flat(
            torch.cat(results) if results else None,
            numel=sum(sizes),
            dtype=torch.float32,
            device=compute_device(),
            src=self.grid.last_stage_rank,
            group=self.grid.pg.pp,
        ).cpu()
        by_row = dict(zip([row for pack in packs for row in pack.rows], flat.split(sizes), strict=True))
        return [by_row[row] for row in range(len(rows))]

    def _score(self, logits: torch.Tensor, pack: Pack) -> torch.Tensor:
        return log_prob_and_entropy(
            logits, pack.targets, group=self.grid.pg.tp, vocab_start=self.model.vocab_start, with_entropy=False
        )[0]

    def accumulate_gradients(
        self, rows: TrainingRows, *, tokens: float, old: Sequence[torch.Tensor] | None = None
    ) -> dict[str, Value]:
        """Forward and backward over this replica's rows; gradients are left reduced in the DDP buffers.

        Args:
            rows: this replica's share.
            tokens: response tokens of the whole update over all replicas: the loss's denominator.
            old: [R_i] log-probabilities at the time of the rollouts; None when the weights have not moved since.

        Returns:
            Metrics of the last pipeline stage's first tensor rank; empty elsewhere, so that none counts twice.
        """
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        packs = self.packs(rows)
        targets = {id(pack): self._targets(rows, pack, old) for pack in packs}

        def last_stage(logits: torch.Tensor, pack: Pack) -> tuple[torch.Tensor, torch.Tensor, dict[str, Value]]:
            return self._loss(logits, pack, targets[id(pack)], tokens)

        reports = run_pipeline(self.ddp, packs, last_stage, grid=self.grid, forward_only=False)
        totals: dict[str, Value] = {}
        for report in reports if self.grid.tp_rank == 0 else ():
            merge(totals, report)
        return totals

    def count_tokens(self, rows: TrainingRows, reducer: Reducer) -> float:
        """Response tokens of an update over all replicas: the loss's denominator. Collective."""
        local = sum(len(response) for response in rows.rollouts.responses)
        return global_token_count(local, reducer=reducer, device=compute_device())

    @staticmethod
    def _targets(rows: TrainingRows, pack: Pack, old: Sequence[torch.Tensor] | None) -> _Targets:
        def column(values: Sequence[torch.Tensor]) -> torch.Tensor:
            return torch.cat([torch.zeros(0), *(values[row] for row in pack.rows)]).to(compute_device())

        return _Targets(
            teacher=column(rows.teacher_log_probs),
            rollout=column(rows.rollouts.log_probs),
            weight=column(rows.weights),
            old=None if old is None else column(old),
        )

    def _loss(
        self, logits: torch.Tensor, pack: Pack, targets: _Targets, tokens: float
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Value]]:
        log_prob, _ = log_prob_and_entropy(
            logits, pack.targets, group=self.grid.pg.tp, vocab_start=self.model.vocab_start, with_entropy=False
        )
        importance = self.loss.importance
        result = sampled_policy_gradient(
            log_prob,
            teacher_log_prob=targets.teacher,
            rollout_log_prob=targets.rollout,
            weight=targets.weight,
            old_log_prob=targets.old,
            clip=self.loss.clip,
            importance_mode=importance.mode,
            importance_low=importance.low,
            importance_high=importance.high,
        )
        loss = token_mean(result.loss, tokens)
        count = log_prob.numel()
        # One transfer for all of them: each would wait for the device by itself.
        sums = torch.stack(
            [loss.detach(), *(v.sum() for v in (result.clipped, result.approx_kl, result.importance, result.corrected))]
        ).tolist()
        # A mean over tokens in the file, whatever the micro-batches, mini-batches and ranks that they are spread over.
        report: dict[str, Value] = {"loss": Mean(sums[0] * tokens, count)}
        report |= {key: Mean(total, count) for key, total in zip(_LOSS_METRICS, sums[1:], strict=True)}
        return loss, torch.tensor(count, dtype=torch.int, device=loss.device), report

    def update(self) -> dict[str, Value]:
        """Apply the accumulated gradients; returns ``grad_norm`` and whether the update was skipped."""
        succeeded, norm, _ = self.optimizer.step()
        return {"grad_norm": Last(float(norm or 0.0)), "update_skipped": Last(float(not succeeded))}
