"""The router: each row to the teachers that its labels name, each answer back to its row.

Shapes: B rows of a replica, R_i response tokens of row i, W columns of what a teacher keeps of a token.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from fire_megatron.data.packing import split_by_tokens
from fire_megatron.data.records import Prompt
from fire_megatron.data.rollouts import KeptStates, Rollouts, Scores, Target, TrainingRows
from fire_megatron.metrics.values import Last, Mean, Value
from fire_megatron.parallel.collectives import all_gather_rows
from fire_megatron.parallel.exchange import exchange
from fire_megatron.parallel.grid import ModelGrid
from fire_megatron.platform import compute_device
from fire_megatron.teachers.states import SCORE_BYTES, slice_width
from fire_megatron.teachers.teacher import Keep, Teacher

EXCHANGE_BYTES = 2**28
"""Of states that travel at a time, over all ranks."""


@dataclass(frozen=True)
class _Gathered:
    """All rows of the step, in the order of their ids."""

    row_ids: list[int]
    targets: list[tuple[str, ...]]
    """Teachers of each row."""
    prompts: list[torch.Tensor]
    responses: list[torch.Tensor]


@dataclass(frozen=True)
class _Assigned:
    """One row and the student's replica that trains on it."""

    row_id: int
    tokens: int
    replica: int


class TeacherRouter:
    """Scores rollouts with several teachers that live on the student's ranks."""

    def __init__(
        self,
        teachers: Mapping[str, Teacher],
        route: Mapping[str, str],
        *,
        student_grid: ModelGrid,
        prompts: Collection[Prompt] = (),
        mixture: str = "distributions",
    ) -> None:
        """Args: teachers: by name; route: label -> teacher name; student_grid: how the rollouts are shared out;
        prompts: all that may come, to know their mixtures; mixture: what a mixture's weights mix, ``distributions`` or
        ``log_probs``."""
        self.teachers = dict(teachers)
        self.route = dict(route)
        self.student_grid = student_grid
        self.mixture = mixture
        mixtures = {self.target(prompt).teachers for prompt in prompts if prompt.mixture}
        self._targets = sorted({(name,) for name in self.teachers} | mixtures)
        self.seconds: dict[str, float] = {}
        """Seconds each teacher took in the last call."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all targets: the teachers, and the mixtures of them that prompts name."""
        return tuple(Target.join(teachers) for teachers in self._targets)

    def target(self, prompt: Prompt) -> Target:
        """Whom the answers to a prompt learn from."""
        weights: dict[str, float] = defaultdict(float)
        for label, share in prompt.shares:
            weights[self.route[label]] += share
        return Target(tuple(sorted(weights)), tuple(weights[name] for name in sorted(weights)))

    def score(
        self, rollouts: Rollouts, *, keep_states: bool = False, progress: Callable[[str], None] | None = None
    ) -> Scores:
        """Score this replica's rollouts; every rank of the student's grid calls it with its own.

        Each row's tokens go to its own teachers only, whose replicas share the rows by token count, and the result
        comes back in the order of ``rollouts``. ``keep_states`` lets the teachers keep what :meth:`attach` will bring.
        ``progress`` is told the name of each teacher that starts.
        """
        rows = self._gather(rollouts)
        results: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}
        kept: dict[str, KeptStates] = {}
        for name, teacher in sorted(self.teachers.items()):
            started = time.perf_counter()
            mine = [i for i, teachers in enumerate(rows.targets) if name in teachers]
            if mine and progress:
                progress(name)
            if mine:
                ids = [rows.row_ids[i] for i in mine]
                scored = teacher.score(
                    [rows.prompts[i] for i in mine],
                    [rows.responses[i] for i in mine],
                    keep=Keep(ids, self.student_grid.layout.tensor) if keep_states else None,
                )
                pairs = zip(scored.log_probs, scored.entropies, strict=True)
                results |= {(row, name): pair for row, pair in zip(ids, pairs, strict=True)}
                if scored.kept is not None:
                    kept[name] = scored.kept
            self.seconds[name] = time.perf_counter() - started
        targets = [self.target(prompt) for prompt in rollouts.prompts]
        combined = [
            self._combined(target, [results[row, name] for name in target.teachers])
            for row, target in zip(rollouts.row_ids, targets, strict=True)
        ]
        return Scores(
            targets=tuple(targets),
            log_probs=tuple(log_probs for log_probs, _ in combined),
            entropies=tuple(entropies for _, entropies in combined),
            kept=kept,
        )

    def _combined(
        self, target: Target, scored: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies of a row's target. A mixture's entropy is taken to be the mean entropy of its
        teachers. A product of distributions is left unnormalised, so its log-probability is too low at each position by
        how much the teachers disagree there: neither can be told from the scores of single tokens."""
        if len(scored) == 1:
            return scored[0]
        log_probs, entropies = (torch.stack(column) for column in zip(*scored, strict=True))
        weights = torch.tensor(target.weights)[:, None]
        mixed = (log_probs * weights).sum(0)
        if self.mixture == "distributions":
            mixed = torch.logsumexp(log_probs + weights.log(), 0)
        return mixed, (entropies * weights).sum(0)

    def _gather(self, rollouts: Rollouts) -> _Gathered:
        """Every replica's rows, sorted by row id so that all layouts score the same packs."""
        group, device = self.student_grid.row_group, compute_device()
        headers = [
            torch.tensor([row, self._targets.index(self.target(prompt).teachers)])
            for row, prompt in zip(rollouts.row_ids, rollouts.prompts, strict=True)
        ]
        columns = [
            all_gather_rows(column, dtype=torch.int64, device=device, group=group)
            for column in (headers, rollouts.prompt_tokens, rollouts.responses)
        ]
        order = sorted(range(len(columns[0])), key=lambda i: int(columns[0][i][0]))
        headers, prompts, responses = ([column[i] for i in order] for column in columns)
        targets = [self._targets[int(h[1])] for h in headers]
        return _Gathered([int(h[0]) for h in headers], targets, prompts, responses)

    def attach(self, rows: TrainingRows, kept: Mapping[str, KeptStates]) -> tuple[TrainingRows, dict[str, Value]]:
        """Bring what the teachers kept of these rows to the ranks that train on them: the student's last stage.

        Each message goes straight from the teacher's replica that scored a row to the student's that trains on it. The
        student's tensor ranks receive a slice of the columns each, so that nothing is sent twice, and put them together
        when they need them. Collective over the student's grid: one small ragged gather, and exchanges of at most
        :data:`EXCHANGE_BYTES` of states.

        Args:
            rows: this replica's share of the rows to train on.
            kept: from :meth:`score`, of all rows.

        Returns:
            The rows with their states on the last stage (without, elsewhere), and ``teacher/<name>/bytes_per_token``:
            what is sent of a response token, scores included; on the last stage, to be reduced.
        """
        last_stage, assigned = self.student_grid.is_last_stage, self._assigned(rows)
        places = {row: place for place, row in enumerate(rows.rollouts.row_ids)}
        states: list[dict[str, torch.Tensor]] = [{} for _ in places]
        metrics: dict[str, Value] = {}
        for name in sorted(assigned):
            teacher, received = self.teachers[name], {}
            if name in kept:
                row_bytes = [row.tokens * teacher.state_bytes for row in assigned[name]]
                for part in split_by_tokens(range(len(row_bytes)), row_bytes, EXCHANGE_BYTES):
                    received |= self._exchange(teacher, kept[name], [assigned[name][i] for i in part])
            for row_id, state in received.items():
                states[places[row_id]][name] = state
            own = [row for row in assigned[name] if row.replica == self.student_grid.dp_rank]
            if last_stage and own:
                metrics |= self._traffic(name, own, received)
        return replace(rows, states=tuple(states)) if last_stage and kept else rows, metrics

    def _assigned(self, rows: TrainingRows) -> dict[str, list[_Assigned]]:
        """Teacher -> the rows that learn from it and where, over all replicas of the student, on every rank."""
        headers = [
            torch.tensor([row, len(response), self._targets.index(target.teachers), self.student_grid.dp_rank])
            for row, response, target in zip(rows.rollouts.row_ids, rows.rollouts.responses, rows.targets, strict=True)
        ]
        gathered = all_gather_rows(headers, dtype=torch.int64, device=compute_device(), group=self.student_grid.pg.dp)
        assigned: dict[str, list[_Assigned]] = defaultdict(list)
        for row, tokens, target, replica in (header.tolist() for header in gathered):
            for name in self._targets[target]:
                assigned[name].append(_Assigned(row, tokens, replica))
        return assigned

    def _exchange(self, teacher: Teacher, kept: KeptStates, assigned: Sequence[_Assigned]) -> dict[int, torch.Tensor]:
        """Row id -> [R_i, c] on CPU, of this rank's rows if it is on the student's last stage."""
        student, theirs, group = self.student_grid, teacher.grid, dist.group.WORLD
        me, columns = dist.get_rank(group), slice_width(teacher.state_width, student.layout.tensor)
        outgoing: dict[int, list[torch.Tensor]] = defaultdict(list)
        incoming: dict[int, list[_Assigned]] = defaultdict(list)
        places = list(itertools.product(range(student.layout.tensor), range(student.layout.context)))
        for row in assigned:
            for tensor, context in places:
                source = theirs.last_stage_of(kept.holder[row.row_id], tensor % theirs.layout.tensor)
                destination = student.last_stage_of(row.replica, tensor, context)
                if source == me:
                    outgoing[destination].append(kept.slices[row.row_id][tensor].flatten())
                if destination == me:
                    incoming[source].append(row)
        received = exchange(
            {rank: torch.cat(parts) for rank, parts in outgoing.items()},
            {rank: columns * sum(row.tokens for row in rows) for rank, rows in incoming.items()},
            dtype=teacher.state_dtype,
            device=compute_device(),
            group=group,
        )
        states = {}
        for rank, rows in incoming.items():
            pieces = received[rank].view(-1, columns).split([row.tokens for row in rows])
            states |= {row.row_id: piece for row, piece in zip(rows, pieces, strict=True)}
        return states

    def _traffic(self, name: str, own: Sequence[_Assigned], received: Mapping[int, torch.Tensor]) -> dict[str, Value]:
        """Bytes a token that came to this rank; each token counts on one of the ranks that get its states."""
        counts = self.student_grid.tp_rank == 0 and self.student_grid.cp_rank == 0
        tokens = sum(row.tokens for row in own) if counts else 0
        sent = sum(state.numel() * state.element_size() for state in received.values())
        model = self.teachers[name].model
        logits = model.used_vocab_size * torch.empty(0, dtype=model.config.params_dtype).element_size()
        return {
            f"teacher/{name}/bytes_per_token": Mean(float(sent + SCORE_BYTES * tokens), float(tokens)),
            f"teacher/{name}/bytes_per_token_of_logits": Last(float(logits)),
        }
