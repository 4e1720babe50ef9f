"""The student: the model under megatron-core's DDP and (distributed) optimizer, and its update.

Shapes: N response tokens of a micro-batch, H hidden size, R_i response tokens of row i, W columns of a teacher's state.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.utils import get_model_config

from fire_megatron.config.schema import LossConfig, OptimizerConfig, PrecisionConfig
from fire_megatron.data.packing import Pack, pack_rows, split_by_rows
from fire_megatron.data.rollouts import TrainingRows
from fire_megatron.losses.divergences import build_divergence
from fire_megatron.losses.estimators import SampledLoss, sampled_policy_gradient
from fire_megatron.losses.fused import OutputLayer, TokenLoss, chunked_linear_loss, map_chunks
from fire_megatron.losses.reduction import global_token_count
from fire_megatron.losses.token_losses import (
    DIVERGENCE_REPORT,
    SAMPLED_REPORT,
    DivergenceSettings,
    Segment,
    Shard,
    full_loss,
    sampled_loss,
    topk_loss,
)
from fire_megatron.losses.vocab_parallel import score_log_prob_and_entropy
from fire_megatron.metrics.values import Last, Mean, Value, merge
from fire_megatron.models.build import DTYPES
from fire_megatron.models.gpt import FireGPT
from fire_megatron.models.pipeline import run_pipeline
from fire_megatron.parallel.collectives import all_gather_columns, broadcast_flat
from fire_megatron.parallel.grid import ModelGrid
from fire_megatron.parallel.reducer import Reducer
from fire_megatron.platform import compute_device
from fire_megatron.teachers.states import unpack_topk


@dataclass(frozen=True)
class _Targets:
    """Per-token inputs of the loss for one pack, in the pack's order."""

    teacher: torch.Tensor
    """[N] float32 log-probabilities."""
    rollout: torch.Tensor
    """[N] float32 log-probabilities."""
    weight: torch.Tensor
    """[N] float32."""
    old: torch.Tensor | None
    """[N] float32 log-probabilities."""
    runs: tuple[tuple[str, tuple[int, ...]], ...]
    """Consecutive rows of one target: its name, and the rows."""


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
        heads: Mapping[str, OutputLayer] | None = None,
    ) -> None:
        """Args: model: this rank's stage; heads: the teachers' output weights, for ``estimator: full`` on the last
        stage. Collective over the grid."""
        self.model, self.grid, self.loss, self.settings = model, grid, loss, optimizer
        self.heads = dict(heads or {})
        self._divergence = DivergenceSettings(
            build_divergence(loss.divergence, beta=loss.beta, skew=loss.skew),
            loss.student_temperature,
            loss.teacher_temperature,
            loss.mixture,
        )
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
        """Micro-batches of this replica's rows, longest rows first, in each of them by teacher; padding alone when it
        has none."""
        lengths = rows.rollouts.lengths
        order = sorted(range(len(rows)), key=lambda i: (-lengths[i], i))
        multiple = self.grid.layout.tensor if self.model.config.sequence_parallel else 1
        return [
            pack_rows(
                rows.rollouts.prompt_tokens,
                rows.rollouts.responses,
                sorted(batch, key=lambda row: rows.targets[row].teachers),  # stable
                multiple=multiple,
                device=compute_device(),
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

    def _score(self, hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
        def score(logits: torch.Tensor, part: slice) -> torch.Tensor:
            shard = self._shard
            return score_log_prob_and_entropy(
                logits, pack.targets[part], group=shard.group, vocab_start=shard.vocab_start
            )[0]

        layer = OutputLayer(self.model.output_weight, self.model.used_columns)
        return map_chunks(hidden, layer, score, chunk_tokens=self.loss.chunk_tokens)

    @property
    def _shard(self) -> Shard:
        return Shard(self.grid.pg.tp, self.model.vocab_start, len(self.model.output_weight))

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

        def last_stage(hidden: torch.Tensor, pack: Pack) -> tuple[torch.Tensor, torch.Tensor, dict[str, Value]]:
            return self._loss(hidden, pack, rows, targets[id(pack)], tokens)

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
            runs=tuple(
                (name, tuple(run)) for name, run in itertools.groupby(pack.rows, lambda row: rows.targets[row].name)
            ),
        )

    def _loss(
        self, hidden: torch.Tensor, pack: Pack, rows: TrainingRows, targets: _Targets, tokens: float
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Value]]:
        """Loss of a micro-batch from its final hidden states [N, H]."""
        lengths = [sum(len(rows.rollouts.responses[row]) for row in run) for _, run in targets.runs]
        loss, report_RN = chunked_linear_loss(
            hidden,
            self.model.output_weight,
            _ESTIMATORS[self.loss.estimator](self, pack, rows, targets, tokens),
            columns=self.model.used_columns,
            segments=lengths,
            chunk_tokens=self.loss.chunk_tokens,
        )
        count = len(hidden)
        sampled = self.loss.estimator == "sampled"
        names = SAMPLED_REPORT if sampled else DIVERGENCE_REPORT
        # One transfer for all of them: each would wait for the device by itself. Sums by run, then over runs.
        sums = torch.stack([part.sum(-1) for part in report_RN.double().split(lengths, -1)] or [report_RN.sum(-1)])
        by_run = sums.tolist()
        # A mean over tokens in the file, whatever the micro-batches, mini-batches and ranks that they are spread over.
        report: dict[str, Value] = {key: Mean(sum(run[i] for run in by_run), count) for i, key in enumerate(names)}
        for (name, _), length, run in zip(targets.runs, lengths, by_run, strict=False) if not sampled else ():
            merge(report, {f"teacher/{name}/divergence": Mean(run[1], length)})
        return loss, torch.tensor(count, dtype=torch.int, device=loss.device), report

    def _sampled(self, pack: Pack, rows: TrainingRows, targets: _Targets, tokens: float) -> TokenLoss:
        importance = self.loss.importance

        def estimate(log_prob: torch.Tensor, part: slice) -> SampledLoss:
            return sampled_policy_gradient(
                log_prob,
                teacher_log_prob=targets.teacher[part],
                rollout_log_prob=targets.rollout[part],
                weight=targets.weight[part],
                old_log_prob=None if targets.old is None else targets.old[part],
                clip=self.loss.clip,
                importance_mode=importance.mode,
                importance_low=importance.low,
                importance_high=importance.high,
            )

        return sampled_loss(pack.targets, estimate, shard=self._shard, tokens=tokens)

    def _full(self, pack: Pack, rows: TrainingRows, targets: _Targets, tokens: float) -> TokenLoss:
        segments = [self._segment(name.split("+"), run, rows) for name, run in targets.runs]
        return full_loss(segments, targets.weight, self._divergence, shard=self._shard, tokens=tokens)

    def _segment(self, names: Sequence[str], run: Sequence[int], rows: TrainingRows) -> Segment:
        """Tokens of consecutive rows with the same teachers."""
        weights = [torch.tensor(rows.targets[row].weights).expand(len(rows.rollouts.responses[row]), -1) for row in run]
        return Segment(
            layers=[self.heads[name] for name in names],
            hidden=[self._states(name, run, rows)[:, : self.heads[name].weight_VH.shape[1]] for name in names],
            weight_NK=torch.cat(weights).to(compute_device()),
        )

    def _topk(self, pack: Pack, rows: TrainingRows, targets: _Targets, tokens: float) -> TokenLoss:
        width = 2 * self.loss.top_k + 1
        states = [self._states(name, run, rows)[:, :width] for name, run in targets.runs]
        empty = torch.zeros(0, width, dtype=torch.int32, device=compute_device())
        teacher = unpack_topk(torch.cat([empty, *states]))
        return topk_loss(teacher, targets.weight, self._divergence, shard=self._shard, tokens=tokens)

    def _states(self, name: str, run: Sequence[int], rows: TrainingRows) -> torch.Tensor:
        """[N of the run, at least W] what a teacher sent of these rows, put together from the tensor ranks' slices."""
        assert rows.states is not None
        own = torch.cat([rows.states[row][name] for row in run]).to(compute_device())
        return all_gather_columns(own, group=self.grid.pg.tp)

    def update(self) -> dict[str, Value]:
        """Apply the accumulated gradients; returns ``grad_norm`` and whether the update was skipped."""
        succeeded, norm, _ = self.optimizer.step()
        return {"grad_norm": Last(float(norm or 0.0)), "update_skipped": Last(float(not succeeded))}


_ESTIMATORS = {"sampled": Student._sampled, "full": Student._full, "topk": Student._topk}
