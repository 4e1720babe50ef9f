"""What teachers keep of rows, brought to the ranks that train on them: the student's last stage.

Each message goes straight from the teacher's replica that scored a row to the student's that trains on it. The
student's tensor ranks receive a slice of the columns each, so that nothing is sent twice, and put them together when
they need them; its context ranks, which share a row's tokens, receive the whole row.

Shapes: R_i response tokens of row i, c columns of a slice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from fire_megatron.data.packing import split_by_tokens
from fire_megatron.data.rollouts import KeptStates, TrainingRows
from fire_megatron.metrics.values import Last, Mean, Value
from fire_megatron.parallel.collectives import all_gather_rows
from fire_megatron.parallel.control import Control
from fire_megatron.parallel.exchange import exchange
from fire_megatron.parallel.grid import ModelGrid
from fire_megatron.platform.device import compute_device
from fire_megatron.platform.host import HostMemory
from fire_megatron.teachers.messages import SCORE_BYTES, slice_width
from fire_megatron.teachers.pool import TeacherPool

EXCHANGE_BYTES = 2**28
"""Of states that travel at a time, over all ranks."""


@dataclass(frozen=True)
class Assigned:
    """One row and the student's replica that trains on it."""

    row_id: int
    tokens: int
    replica: int


class Transfer:
    """Moves teachers' states. Collective over the student's ranks and the ranks of the teachers concerned."""

    def __init__(self, pool: TeacherPool, student_grid: ModelGrid, control: Control | None = None) -> None:
        """Args: pool: where teachers are and what this rank keeps for them; control: to ranks without the student."""
        self.pool, self.student_grid, self.control = pool, student_grid, control
        self._memory = HostMemory()

    def attach(self, rows: TrainingRows, kept: Mapping[str, KeptStates]) -> tuple[TrainingRows, dict[str, Value]]:
        """Bring what the teachers kept of these rows; every rank of the student calls it. One small ragged gather, and
        exchanges of at most :data:`EXCHANGE_BYTES` of states.

        Args:
            rows: this replica's share of the rows to train on.
            kept: of all rows, by teacher; empty when the loss needs none.

        Returns:
            The rows with their states on the last stage until the next call (without, elsewhere), and
            ``teacher/<name>/bytes_per_token``: what is sent of a response token, scores included; on the last stage, to
            be reduced.
        """
        self._memory.reset()
        last_stage, assigned = self.student_grid.is_last_stage, self._assigned(rows)
        places = {row: place for place, row in enumerate(rows.rollouts.row_ids)}
        states: list[dict[str, torch.Tensor]] = [{} for _ in places]
        metrics: dict[str, Value] = {}
        moved = [name for name in sorted(assigned) if name in kept]
        told = [name for name in moved if name in self.pool.reaching]
        if told and self.control is not None:
            self.control.announce(do="attach", teachers=told)
        for name in sorted(assigned):
            received = {}
            if name in told:
                self.pool.table(name, _table(assigned[name]))
            if name in moved:
                received = self._exchange(name, kept[name], assigned[name])
            for row_id, state in received.items():
                states[places[row_id]][name] = state
            own = [row for row in assigned[name] if row.replica == self.student_grid.dp_rank]
            if last_stage and own:
                metrics |= self._traffic(name, own, received)
        return replace(rows, states=tuple(states)) if last_stage and kept else rows, metrics

    def serve(self, name: str) -> None:
        """The part in :meth:`attach` of a rank that holds none of the student."""
        if name in self.pool.teachers:
            self.pool.doing(f"sending states as {name}")
            table = self.pool.table(name, None)
            assert table is not None
            self._exchange(name, self.pool.kept[name], [Assigned(*row) for row in table.view(-1, 3).tolist()])

    def _assigned(self, rows: TrainingRows) -> dict[str, list[Assigned]]:
        """Teacher -> the rows that learn from it and where, over all replicas of the student, on every rank."""
        names = list(self.pool.infos)
        headers = [
            torch.tensor(
                [row, len(response), self.student_grid.dp_rank, *(names.index(name) for name in target.teachers)]
            )
            for row, response, target in zip(rows.rollouts.row_ids, rows.rollouts.responses, rows.targets, strict=True)
        ]
        gathered = all_gather_rows(headers, dtype=torch.int64, device=compute_device(), group=self.student_grid.pg.dp)
        assigned: dict[str, list[Assigned]] = defaultdict(list)
        for row, tokens, replica, *teachers in (header.tolist() for header in gathered):
            for index in teachers:
                assigned[names[index]].append(Assigned(row, tokens, replica))
        return assigned

    def _exchange(self, name: str, kept: KeptStates, assigned: Sequence[Assigned]) -> dict[int, torch.Tensor]:
        """Row id -> [R_i, c] on CPU, of this rank's rows if it is on the student's last stage."""
        row_bytes = [row.tokens * self.pool.infos[name].state_bytes for row in assigned]
        received = {}
        for part in split_by_tokens(range(len(row_bytes)), row_bytes, EXCHANGE_BYTES):
            received |= self._exchange_part(name, kept, [assigned[i] for i in part])
        return received

    def _exchange_part(self, name: str, kept: KeptStates, assigned: Sequence[Assigned]) -> dict[int, torch.Tensor]:
        info, student, group = self.pool.infos[name], self.pool.student, dist.group.WORLD
        me, columns = dist.get_rank(group), slice_width(info.state_width, student.tensor)
        outgoing: dict[int, list[torch.Tensor]] = defaultdict(list)
        incoming: dict[int, list[Assigned]] = defaultdict(list)
        states: dict[int, torch.Tensor] = {}
        places = [(tensor, context) for tensor in range(student.tensor) for context in range(student.context)]
        for row in assigned:
            for tensor, context in places:
                source = info.layout.last_stage_of(kept.holder[row.row_id], tensor % info.layout.tensor)
                destination = student.last_stage_of(row.replica, tensor, context)
                if source == destination == me:
                    states[row.row_id] = kept.slices[row.row_id][tensor]
                elif source == me:
                    outgoing[destination].append(kept.slices[row.row_id][tensor])
                elif destination == me:
                    incoming[source].append(row)
        received = exchange(
            outgoing,
            {rank: columns * sum(row.tokens for row in rows) for rank, rows in incoming.items()},
            dtype=info.state_dtype,
            group=group,
            memory=self._memory,
        )
        for rank, rows in incoming.items():
            pieces = received[rank].view(-1, columns).split([row.tokens for row in rows])
            states |= {row.row_id: piece for row, piece in zip(rows, pieces, strict=True)}
        return states

    def _traffic(self, name: str, own: Sequence[Assigned], received: Mapping[int, torch.Tensor]) -> dict[str, Value]:
        """Bytes a token that came to this rank; each token counts on one tensor rank of one context rank."""
        counts = self.student_grid.tp_rank == 0 and self.student_grid.cp_rank == 0
        tokens = sum(row.tokens for row in own) if counts else 0
        sent = sum(state.numel() * state.element_size() for state in received.values())
        return {
            f"teacher/{name}/bytes_per_token": Mean(float(sent + SCORE_BYTES * tokens), float(tokens)),
            f"teacher/{name}/bytes_per_token_of_logits": Last(float(self.pool.infos[name].logit_bytes)),
        }


def _table(assigned: Sequence[Assigned]) -> torch.Tensor:
    return torch.tensor([(row.row_id, row.tokens, row.replica) for row in assigned]).flatten()
