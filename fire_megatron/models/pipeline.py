"""Running packs through a role's pipeline with megatron-core's schedules on explicit groups."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import get_model_config

from fire_megatron.data.packing import Pack, pack_rows
from fire_megatron.models.fp8.settings import release_quantized_weights, shares_amax, token_multiple
from fire_megatron.models.packed import packed_seq_params
from fire_megatron.parallel.collectives import largest
from fire_megatron.parallel.grid import ModelGrid
from fire_megatron.platform.device import compute_device
from fire_megatron.platform.watch import tick

LastStage = Callable[[torch.Tensor, Pack], Any]
"""(final hidden states [N, H], pack) -> result; in training a triple (loss, token count, report)."""


def _finish(last_stage: LastStage, pack: Pack, output: torch.Tensor, non_loss_data: bool = False) -> Any:
    return last_stage(output, pack)


def _forward_step(last_stage: LastStage, packs: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
    tick()
    pack = next(packs)
    trains_experts = model.training and get_model_config(model).num_moe_experts
    output = model(
        pack.token_ids,
        pack.position_ids,
        packed=packed_seq_params(pack),
        select=pack.select,
        padding=pack.padding if trains_experts else None,
        project=False,
    )
    return output, partial(_finish, last_stage, pack)


def padding_pack(model: torch.nn.Module, grid: ModelGrid) -> Pack:
    """A micro-batch without rows, for a replica that has none left while others wait for it."""
    return pack_rows(
        (), (), (),
        multiple=token_multiple(get_model_config(model)), device=compute_device(),
        context=grid.layout.context, context_rank=grid.cp_rank,
    )  # fmt: skip


def _in_lockstep(
    packs: Sequence[Pack], model: torch.nn.Module, grid: ModelGrid, *, forward_only: bool
) -> Sequence[Pack]:
    """As many micro-batches as any replica has that takes part in this one's passes: those that share its experts, and
    in training with delayed scaling of FP8 all of them. One exchange of counts there, nothing elsewhere."""
    together = shares_amax(get_model_config(model)) and not forward_only
    (most,) = largest(len(packs), group=grid.pg.tp_dp_cp if together else grid.pg.ep)
    return [*packs, *(padding_pack(model, grid) for _ in range(most - len(packs)))]


class _KnownShapes(P2PCommunicator):
    """megatron-core's messages between stages, with the shapes that the packs have. Micro-batches differ in length, so
    megatron-core would have the stages tell each other every shape in a message of its own and wait for the device
    twice; but every rank of a replica has the same packs, and they pass a stage in order, in both directions."""

    def __init__(self, grid: ModelGrid, config: Any, packs: Sequence[Pack]) -> None:
        super().__init__(grid.pg.pp, config)
        split = grid.layout.tensor if config.sequence_parallel else 1
        shapes = [[pack.token_ids.shape[1] // split, 1, config.hidden_size] for pack in packs]
        self._sent_next, self._sent_prev, self._from_prev, self._from_next = map(iter, itertools.repeat(shapes, 4))

    def _communicate_shapes(
        self,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[list[int], list[int]]:
        """Shapes to receive from the stage before and the one after."""
        for tensor, shapes in ((tensor_send_next, self._sent_next), (tensor_send_prev, self._sent_prev)):
            assert tensor is None or list(tensor.shape) == next(shapes), "the next stage expects another shape"
        nothing = [0, 0, 0]
        return next(self._from_prev) if recv_prev else nothing, next(self._from_next) if recv_next else nothing


def run_pipeline(
    model: torch.nn.Module, packs: Sequence[Pack], last_stage: LastStage, *, grid: ModelGrid, forward_only: bool
) -> list[Any]:
    """Run micro-batches through this role's pipeline (1F1B, or one stage after the other without pipelining).

    Args:
        model: this rank's stage, wrapped for data parallelism in training.
        packs: the micro-batches; the same on every rank of a replica, at least one. Replicas that share experts
            (``grid.pg.ep``), and in training with delayed scaling of FP8 all replicas, call this together, each with
            its own number of them.
        last_stage: called by the last stage with each micro-batch's final hidden states at the positions that predict a
            response token.
        grid: the role's groups.
        forward_only: score without gradients.

    Returns:
        What ``last_stage`` returned (in training its third item), one a micro-batch; empty on other stages.
    """
    assert packs, "every rank runs at least one micro-batch, if only of padding"
    batches = _in_lockstep(packs, model, grid, forward_only=forward_only)
    pipeline = grid.layout.pipeline
    schedule = get_forward_backward_func(pp_size=pipeline, vp_size=None)
    config = get_model_config(model)
    results = schedule(
        forward_step_func=partial(_forward_step, last_stage),
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=batches[0].token_ids.shape[1],
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
        p2p_communicator=_KnownShapes(grid, config, batches) if pipeline > 1 else None,
        pg_collection=grid.pg,
    )
    release_quantized_weights(model)
    return list(results)[: len(packs)] if grid.is_last_stage else []
