"""ModelGrid: the process groups of one role on its span of ranks.

A run is one world; each role (the student, every teacher) lays its own TP x CP x DP x PP grid over a span of
that world's ranks. megatron-core takes the groups as a ``ProcessGroupCollection``; nothing here or above reads
its global ``parallel_state``.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_expert_parallel_rng_tracker_name,
    model_parallel_cuda_manual_seed,
)

from fire_megatron.platform import launch

IDLE = datetime.timedelta(days=30)
"""A role without work waits without limit: platform/watch.py ends the run when there is no rank left to wait for."""


@dataclass(frozen=True)
class Layout:
    """Sizes of a role's parallel dimensions and its span of ranks. Data parallelism fills the span."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    first_rank: int = 0
    num_ranks: int = 1

    def __post_init__(self) -> None:
        assert self.num_ranks % self.model_ranks == 0, self

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one replica."""
        return self.tensor * self.pipeline * self.context

    @property
    def ranks(self) -> range:
        """The span."""
        return range(self.first_rank, self.first_rank + self.num_ranks)

    @property
    def data(self) -> int:
        """Number of data-parallel replicas."""
        return self.num_ranks // self.model_ranks

    @property
    def row_replicas(self) -> int:
        """Groups of ranks that hold rows of their own outside of the update (:attr:`ModelGrid.row_group`)."""
        return self.data * self.context

    @property
    def row_leaders(self) -> list[int]:
        """Global rank of the first stage's first tensor rank of each row replica, which speaks for it."""
        return [self.first_rank + self.tensor * replica for replica in range(self.row_replicas)]

    def last_stage_of(self, replica: int, tensor: int, context: int = 0) -> int:
        """Global rank of the last stage at a place in the data-parallel, tensor and context dimensions."""
        per_stage = self.tensor * self.row_replicas
        return (
            self.first_rank
            + per_stage * (self.pipeline - 1)
            + tensor
            + self.tensor * (context + self.context * replica)
        )


@dataclass(frozen=True)
class ModelGrid:
    """Process groups of one role, as seen by this rank."""

    layout: Layout
    pg: ProcessGroupCollection
    span: dist.ProcessGroup
    """All ranks of the role."""
    is_member: bool = field(default=True)
    """Whether this rank holds a part of the role's model."""

    @property
    def tp_rank(self) -> int:
        """Rank within the tensor-parallel group."""
        return self.pg.tp.rank()

    @property
    def pp_rank(self) -> int:
        """Pipeline stage."""
        return self.pg.pp.rank()

    @property
    def dp_rank(self) -> int:
        """Data-parallel replica."""
        return self.pg.dp.rank()

    @property
    def cp_rank(self) -> int:
        """Place among the ranks that share each sequence."""
        return self.pg.cp.rank()

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds tokens."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank projects to the vocabulary."""
        return self.pp_rank == self.layout.pipeline - 1

    @property
    def row_group(self) -> dist.ProcessGroup:
        """Ranks that hold different rows outside of the update: context-parallel ranks share a sequence only in forward
        and backward passes of packs, and sample, score and select rows of their own."""
        return self.pg.dp_cp

    @property
    def row_replica(self) -> int:
        """Place in :attr:`row_group`."""
        return self.pg.dp_cp.rank()

    @property
    def row_replicas(self) -> int:
        """Size of :attr:`row_group`."""
        return self.layout.row_replicas

    def own_rows(self, rows: int) -> list[int]:
        """The rows of 0..rows-1 that this rank's row replica samples."""
        return list(range(self.row_replica, rows, self.row_replicas))

    @property
    def leads_rows(self) -> bool:
        """Whether this rank speaks for its row replica."""
        return self.is_member and dist.get_rank() in self.layout.row_leaders

    @property
    def last_stage_rank(self) -> int:
        """Global rank of this pipeline's last stage."""
        return dist.get_process_group_ranks(self.pg.pp)[-1]


def _set_megatron_globals() -> None:
    """Two process-wide objects that megatron-core wants whatever the groups; neither names one."""
    # 0.16.1's sequence-parallel gathers take their scratch space from here.
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
    # Sequence parallelism forks this tracker around dropout; all our dropout is 0, so any seed serves.
    tracker = get_cuda_rng_tracker()
    if get_expert_parallel_rng_tracker_name() not in tracker.get_states():
        model_parallel_cuda_manual_seed(0, tp_rank=0, ep_rank=0, etp_rank=0)


_DENSE_GROUPS = {
    "tp": ["tp"],
    "cp": ["cp"],
    "dp": ["dp"],
    "pp": ["pp"],
    "mp": ["tp", "pp"],
    "tp_cp": ["tp", "cp"],
    "dp_cp": ["cp", "dp"],
    "tp_dp_cp": ["tp", "cp", "dp"],
}
_EXPERT_GROUPS = {
    "ep": ["ep"],
    "expt_tp": ["tp"],
    "tp_ep": ["tp", "ep"],
    "tp_ep_pp": ["tp", "ep", "pp"],
    "expt_dp": ["dp"],
}


class GridFactory:
    """Makes one ModelGrid a layout: roles with the same layout share their process groups."""

    def __init__(self, *, timeout: float) -> None:
        """Args: timeout: seconds that a collective of any of the groups may take."""
        self._timeout = launch.collective_patience(timeout)
        self._grids: dict[Layout, ModelGrid] = {}
        self._groups: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup | None] = {}
        self._cpu_groups: dict[tuple[object, ...], dist.ProcessGroup | None] = {}

    def grid(self, layout: Layout) -> ModelGrid:
        """The grid of this layout. Collective: every rank of the world calls it in the same order."""
        if layout not in self._grids:
            self._grids[layout] = self._build(layout)
        return self._grids[layout]

    def cpu_group(self, ranks: Iterable[int], *, purpose: str = "") -> dist.ProcessGroup | None:
        """gloo over these ranks, for messages that may be waited for as long as another role works; None on other
        ranks. One for each purpose. Collective: every rank of the world calls it in the same order."""
        members = sorted(set(ranks))
        key = (purpose, *members)
        if key not in self._cpu_groups:
            # gloo connects two ranks when both first need it, so that may be waited for as well.
            group = dist.new_group(members, backend="gloo", timeout=IDLE)
            self._cpu_groups[key] = group if dist.get_rank() in members else None
        return self._cpu_groups[key]

    def _group(self, enumeration: list[list[int]]) -> dist.ProcessGroup | None:
        # Dimensions of size 1 make many of the groups coincide; each distinct partition exists once.
        key = tuple(tuple(ranks) for ranks in enumeration)
        if key not in self._groups:
            self._groups[key] = self._new_group(enumeration)
        return self._groups[key]

    def _new_group(self, enumeration: list[list[int]]) -> dist.ProcessGroup | None:
        """Create every group of the enumeration (all ranks of the world join) and return this rank's own."""
        mine = None
        for ranks in enumeration:
            group = dist.new_group(ranks, timeout=self._timeout)
            if dist.get_rank() in ranks:
                mine = group
        return mine

    def _build(self, layout: Layout) -> ModelGrid:
        tensor, context, data, pipeline = layout.tensor, layout.context, layout.data, layout.pipeline
        dense = HyperCommGrid([tensor, context, data, pipeline], ["tp", "cp", "dp", "pp"], layout.first_rank)
        per_stage = tensor * context * data
        assert per_stage % (tensor * layout.expert) == 0, layout
        expert_data = per_stage // (tensor * layout.expert)
        expert = HyperCommGrid(
            [tensor, layout.expert, expert_data, pipeline], ["tp", "ep", "dp", "pp"], layout.first_rank
        )
        groups = {name: self._group(dense.get_rank_enum(dims)) for name, dims in _DENSE_GROUPS.items()}
        groups |= {name: self._group(expert.get_rank_enum(dims)) for name, dims in _EXPERT_GROUPS.items()}
        pipelines = dense.get_rank_enum(["pp"])
        groups["embd"] = self._group([sorted({p[0], p[-1]}) for p in pipelines])
        groups["pos_embd"] = self._group([[p[0]] for p in pipelines])
        groups["intra_dp_cp"] = groups["dp_cp"]
        groups["intra_expt_dp"] = groups["expt_dp"]
        everyone = list(layout.ranks)
        span = self._group([everyone])
        groups["intra_dist_opt"] = span
        groups["inter_dist_opt"] = None
        groups["hcp"] = None
        _set_megatron_globals()
        return ModelGrid(layout, ProcessGroupCollection(**groups), span, dist.get_rank() in everyone)
