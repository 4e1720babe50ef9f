"""The student: the model under megatron-core's DDP and (distributed) optimizer, and its update.

Shapes: N response tokens of a micro-batch, H hidden size, R_i response tokens of row i.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.utils import get_model_config

from fire_megatron.config.loss import LossConfig
from fire_megatron.config.schema import OptimizerConfig, PrecisionConfig
from fire_megatron.data.packing import Pack, fill_by_tokens, pack_rows, split_by_rows, whole_tokens
from fire_megatron.data.rollouts import TrainingRows
from fire_megatron.losses.fused import OutputLayer
from fire_megatron.losses.reduction import global_token_count
from fire_megatron.metrics.values import Last, Value, merge
from fire_megatron.models.experts import begin_update, router_metrics
from fire_megatron.models.fp8.settings import token_multiple
from fire_megatron.models.gpt import FireGPT
from fire_megatron.models.pipeline import run_pipeline
from fire_megatron.parallel.collectives import broadcast_flat, world_narrowed_to
from fire_megatron.parallel.grid import ModelGrid
from fire_megatron.parallel.lone import lone_groups_silent
from fire_megatron.parallel.reducer import Reducer
from fire_megatron.platform.device import compute_device
from fire_megatron.train.objective import LossReport, MicroBatch, Objective


def build_optimizer(model: DistributedDataParallel, config: OptimizerConfig, *, grid: ModelGrid) -> ChainedOptimizer:
    """megatron-core's AdamW over this rank's parameters; biases and norms are not decayed."""
    dtype = get_model_config(model).params_dtype
    settings = MegatronOptimizerConfig(
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
        fp8_recipe=get_model_config(model).fp8_recipe if get_model_config(model).fp8 else None,
    )
    with lone_groups_silent(), world_narrowed_to(grid.span):
        optimizer = get_megatron_optimizer(settings, [model], use_gloo_process_groups=False, pg_collection=grid.pg)
    for group in optimizer.param_groups:
        if "fused" in group:  # torch's Adam, where there is neither Transformer Engine nor apex
            group["fused"] = True  # one pass over memory instead of ten
    return optimizer


class Student:
    """Trains a model whose weights are loaded. Gradients are summed over micro-batches and data- and
    context-parallel ranks; the loss function has already divided by the global token count."""

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
        self.model, self.grid, self.settings = model, grid, optimizer
        self.objective = Objective(model, loss, heads or {})
        config, fp8 = get_model_config(model), precision.fp8
        gathers_fp8 = fp8 is not None and fp8.param_gather
        self.ddp = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                # A single replica has no other to share with, and would copy all gradients and weights to itself; but
                # only the distributed optimizer quantises weights anew.
                use_distributed_optimizer=optimizer.distributed and (grid.pg.dp_cp.size() > 1 or gathers_fp8),
                overlap_grad_reduce=False,
                fp8_param_gather=gathers_fp8,
            ),
            model,
            pg_collection=grid.pg,
        )
        for module in model.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):  # Transformer Engine's: products that add to float32 sums
                module.fuse_wgrad_accumulation = True
        self.optimizer = build_optimizer(self.ddp, optimizer, grid=grid)
        config.grad_scale_func = self.optimizer.scale_loss
        config.no_sync_func = self.ddp.no_sync
        config.finalize_model_grads_func = self._finalize_gradients

    def _finalize_gradients(self, model: list, num_tokens: object, *args: object, **kwargs: object) -> None:
        # The token count is dropped on purpose: dividing is the loss's business (losses/reduction.py).
        kwargs.pop("pg_collection", None)
        with lone_groups_silent():
            finalize_model_grads(model, None, pg_collection=self.grid.pg, **kwargs)
        if self.model.emulated_fp8 is not None:
            self.model.emulated_fp8.end_update(group=self.grid.pg.tp_dp_cp)

    def gradients(self) -> Iterator[torch.Tensor]:
        """Gradient memory, which an update begins by setting to zero."""
        yield from (buffer.grad_data for buffer in (*self.ddp.buffers, *self.ddp.expert_parallel_buffers))

    def weights(self) -> Iterator[torch.Tensor]:
        """The model's memory."""
        yield from self.model.parameters()
        for buffer in (*self.ddp.buffers, *self.ddp.expert_parallel_buffers):
            yield from () if buffer.param_data is None else (buffer.param_data,)

    def memory(self) -> Iterator[torch.Tensor]:
        """What lasts from step to step: weights and optimizer state."""
        yield from self.weights()
        for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            for group in part.optimizer.param_groups if part.optimizer is not None else ():
                for parameter in group["params"]:
                    yield parameter
                    yield from (x for x in part.optimizer.state.get(parameter, {}).values() if torch.is_tensor(x))

    def set_learning_rate(self, rate: float) -> None:
        """Set the rate of the next update."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_mult", 1.0)

    def packs(self, rows: TrainingRows) -> list[Pack]:
        """Micro-batches of this replica's rows, longest rows first, in each of them by teacher; padding alone when it
        has none. Under context parallelism, this rank's part of them."""
        lengths, budget = rows.rollouts.lengths, self.settings.micro_batch_tokens
        if budget:
            batches = fill_by_tokens(range(len(rows)), lengths, budget)
        else:
            order = sorted(range(len(rows)), key=lambda i: (-lengths[i], i))
            batches = split_by_rows(order, self.settings.micro_batch_size)
        return [
            pack_rows(
                rows.rollouts.prompt_tokens,
                rows.rollouts.responses,
                sorted(batch, key=lambda row: rows.targets[row].teachers),  # stable
                multiple=token_multiple(self.model.config),
                device=compute_device(),
                context=self.grid.layout.context,
                context_rank=self.grid.cp_rank,
            )
            for batch in batches or [[]]
        ]

    def log_probs(self, rows: TrainingRows) -> list[torch.Tensor]:
        """The trainer's log-probabilities of the responses under the present weights: [R_i] float32 each."""
        packs = self.packs(rows)

        def last_stage(hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
            return whole_tokens(self.objective.log_probs(hidden, pack), pack, group=self.grid.pg.cp)

        self.ddp.eval()
        with torch.no_grad():
            results = run_pipeline(self.ddp, packs, last_stage, grid=self.grid, forward_only=True)
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

    def accumulate_gradients(
        self, rows: TrainingRows, *, tokens: float, old: Sequence[torch.Tensor] | None = None
    ) -> dict[str, Value]:
        """Forward and backward over this replica's rows; gradients are left reduced in the DDP buffers.

        Args:
            rows: this replica's share.
            tokens: response tokens of the whole update over all replicas: the loss's denominator.
            old: [R_i] log-probabilities at the time of the rollouts; None when the weights have not moved since.

        Returns:
            Metrics of the loss from the last pipeline stage's first tensor rank alone, about the tokens that are its
            context rank's, so that none counts twice; and each rank's part of what the routers of experts report.
        """
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        packs = self.packs(rows)
        begin_update(self.model, packs, group=self.grid.pg.dp)
        ready = MicroBatch.of(packs, rows, old, tokens) if self.grid.is_last_stage else []
        batches = {id(batch.pack): batch for batch in ready}

        def last_stage(hidden: torch.Tensor, pack: Pack) -> tuple[torch.Tensor, int, LossReport]:
            batch = batches.get(id(pack)) or MicroBatch.of([pack], rows, old, tokens)[0]  # one of padding
            loss, report = self.objective(hidden, batch)
            return loss, len(hidden), report

        reports = run_pipeline(self.ddp, packs, last_stage, grid=self.grid, forward_only=False)
        totals = self.objective.metrics(reports) if self.grid.tp_rank == 0 else {}
        return merge(totals, router_metrics(self.model, group=self.grid.pg.tp_dp_cp))

    def count_tokens(self, rows: TrainingRows, reducer: Reducer) -> float:
        """Response tokens of an update over all replicas: the loss's denominator. Collective."""
        local = sum(len(response) for response in rows.rollouts.responses)
        return global_token_count(local, reducer=reducer, device=compute_device())

    def update(self, skip: Callable[[float], bool] = lambda norm: False) -> dict[str, Value]:
        """Apply the accumulated gradients; returns ``grad_norm``.

        Args:
            skip: is told the norm of the whole gradient before clipping, and whether to leave weights and optimizer as
                they are. The same on every rank.
        """
        optimizer = self.optimizer
        measure, apply, norm = optimizer.get_grad_norm, optimizer.step_with_ready_grads, 0.0

        def measured() -> float:
            nonlocal norm
            norm = float(measure() or 0.0)
            return norm

        # megatron-core's step() has no hook between measuring and applying.
        optimizer.get_grad_norm = measured
        optimizer.step_with_ready_grads = lambda: not skip(norm) and apply()
        try:
            with lone_groups_silent():
                optimizer.step()
        finally:
            del optimizer.get_grad_norm, optimizer.step_with_ready_grads
        return {"grad_norm": Last(norm)}
