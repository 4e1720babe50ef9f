"""The router: each row to the teachers that its labels name, each answer back to its row.

Shapes: B rows of a replica, R_i response tokens of row i.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from fire_megatron.config.errors import TrainingError
from fire_megatron.data.records import Prompt
from fire_megatron.data.rollouts import KeptStates, Rollouts, Scores, Target, TrainingRows
from fire_megatron.metrics.values import Max, Sum, Value
from fire_megatron.parallel.collectives import all_gather_rows, broadcast_flat
from fire_megatron.parallel.control import Control
from fire_megatron.parallel.grid import IDLE, ModelGrid
from fire_megatron.parallel.mail import Silence
from fire_megatron.platform.device import compute_device
from fire_megatron.platform.offload import Offload
from fire_megatron.platform.watch import Watch
from fire_megatron.teachers.messages import Answer, Rows
from fire_megatron.teachers.pool import TeacherPool
from fire_megatron.teachers.transfer import Transfer

TokenScores = tuple[torch.Tensor, torch.Tensor]
"""[R_i] log-probabilities and entropies of a row."""


class TeacherRouter:
    """The student's side: what its ranks do to have rollouts scored."""

    def __init__(
        self,
        pool: TeacherPool,
        route: Mapping[str, str],
        *,
        student_grid: ModelGrid,
        prompts: Collection[Prompt] = (),
        mixture: str = "distributions",
        control: Control | None = None,
        watch: Watch | None = None,
        timeout: float | None = None,
        offload: Offload | None = None,
        group_size: int = 0,
    ) -> None:
        """On ranks of the student.

        Args:
            pool: where the teachers are.
            route: label -> teacher name.
            student_grid: how the rollouts are shared out.
            prompts: all that may come, to know their mixtures.
            mixture: what a mixture's weights mix, ``distributions`` or ``log_probs``.
            control: to the ranks that hold teachers and none of the student; None where there are none.
            watch: knows what these ranks were doing, for messages.
            timeout: seconds that an answer may take; None waits without limit.
            offload: where the student waits while teachers on its ranks score.
            group_size: rows that a replica sends to teachers on other ranks at a time; 0 is a quarter of them.
        """
        self.pool, self.route, self.student_grid = pool, dict(route), student_grid
        self.mixture, self.control, self.watch, self.timeout = mixture, control, watch, timeout
        self.offload, self.group_size = offload, group_size
        self.transfer = Transfer(pool, student_grid, control)
        mixtures = {self.target(prompt).teachers for prompt in prompts if prompt.mixture}
        self._targets = sorted({(name,) for name in pool.infos} | mixtures)

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

    def open(
        self,
        prompts: Sequence[Prompt],
        row_ids: Sequence[int],
        *,
        total: int,
        keep_states: bool = False,
        temperature: float = 1.0,
    ) -> Scoring:
        """Begin to have this replica's rows scored. Collective over the student's grid, as is everything that is done
        with the scoring.

        Args:
            prompts: of this replica's rows.
            row_ids: of this replica's rows.
            total: rows of all replicas, spread evenly over them.
            keep_states: lets the teachers keep what :meth:`attach` will bring.
            temperature: of the log-probabilities; entropies are those of temperature 1.
        """
        most = max(1, -(-total // self.student_grid.row_replicas))
        size = (self.group_size or -(-most // 4)) if self.pool.remote else most
        by_row = dict(zip(row_ids, prompts, strict=True))
        rounds = -(-most // size)
        return Scoring(self, by_row, rounds=rounds, group_size=size, keep=keep_states, temperature=temperature)

    def attach(self, rows: TrainingRows, kept: Mapping[str, KeptStates]) -> tuple[TrainingRows, dict[str, Value]]:
        """Bring what the teachers kept of these rows: :meth:`Transfer.attach`."""
        return self.transfer.attach(rows, kept)

    def no_answer(self, door: int) -> TrainingError:
        """What to say of the teachers at a door that is silent."""
        names = [name for name in self.pool.infos if self.pool.door(name) == door]
        ranks = sorted({rank for name in names for rank in self.pool.infos[name].layout.ranks})
        doing = self.watch.describe(ranks) if self.watch else f"it is on ranks {ranks}"
        error = TrainingError(
            f"{' and '.join(f'teachers.{name}' for name in names)} did not answer within run.collective_timeout "
            f"({self.timeout:g} s), so the run ends: {doing}; run again to continue from the last checkpoint, with a "
            "longer run.collective_timeout if it was only slow"
        )
        error.passing = True
        return error

    def announce(self, **order: object) -> None:
        """Tell the ranks that hold teachers and none of the student what to do."""
        if self.control is not None:
            self.control.announce(**order)

    def combined(self, target: Target, scored: Sequence[TokenScores]) -> TokenScores:
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


class Scoring:
    """The scoring of one step's rows of this replica.

    Teachers on ranks of their own score groups of rows as they come. Those on the student's ranks score when all rows
    are there, on each rank in the order of their names.
    """

    def __init__(
        self,
        router: TeacherRouter,
        prompts: Mapping[int, Prompt],
        *,
        rounds: int,
        group_size: int,
        keep: bool,
        temperature: float,
    ) -> None:
        """Args: prompts: of this replica's rows, by id; rounds: groups that each replica sends; group_size: rows of a
        group; keep: whether teachers keep states of the rows; temperature: of the log-probabilities."""
        self.router, self.pool = router, router.pool
        self._how = {"keep": keep, "temperature": temperature}
        self.group_size = group_size
        self._prompts, self._rounds, self._round = dict(prompts), rounds, 0
        self._targets = {row: router.target(prompt) for row, prompt in prompts.items()}
        self._requests: dict[str, list[dict[int, int]]] = defaultdict(list)
        self._held: dict[int, torch.Tensor] = {}
        self.seconds: dict[str, float] = {}
        """That each teacher took, as its span's first rank measured it."""
        self._bytes = self.pool.mail.bytes
        try:
            self.pool.begin(router.timeout)
        except Silence as silence:
            raise router.no_answer(silence.peer) from None
        if self.pool.reaching:
            router.announce(do="sample", rounds=rounds, **self._how)

    def send(self, row_ids: Sequence[int], responses: Sequence[torch.Tensor]) -> None:
        """A group of finished rows: off to the teachers on other ranks. Does not wait."""
        assert self._round < self._rounds, f"more than the {self._rounds} groups that were announced"
        self._round += 1
        group = dict(zip(row_ids, responses, strict=True))
        self._held |= group
        for name in self.pool.remote:
            self._request(name, group)

    def _request(self, name: str, responses: Mapping[int, torch.Tensor]) -> None:
        mine = {row: response for row, response in responses.items() if name in self._targets[row].teachers}
        self._requests[name].append({row: len(response) for row, response in mine.items()})
        if self.router.student_grid.leads_rows:
            prompts = [torch.tensor(self._prompts[row].seen_by(name), dtype=torch.int64) for row in mine]
            rows = Rows(list(mine), prompts, list(mine.values()))
            self.pool.mail.send(rows.pack(), to=self.pool.door(name), tag=self.pool.tag(name))

    def seal(self) -> None:
        """No more rows come: replicas with fewer of them send empty groups in place of the rest."""
        while self._round < self._rounds:
            self.send([], [])

    def drain(self) -> None:
        """Give up: wait for what has been sent, so that all ranks are free."""
        self.seal()
        self._answers(self.pool.remote)

    def finish(self, rollouts: Rollouts, progress: Callable[[str], None] | None = None) -> Scores:
        """Wait for all scores.

        Args:
            rollouts: this replica's, all of whose rows have been sent.
            progress: is given the name of each teacher on this rank as it starts.

        Returns:
            Scores in the order of the rollouts, on every rank of the replica.

        Raises:
            TrainingError: a teacher on other ranks did not answer within the timeout.
        """
        self.seal()
        if self.pool.shared:
            self._score_here(progress)
        scored: dict[tuple[int, str], TokenScores] = {}
        holders: list[torch.Tensor] = []
        tags = {name: self.pool.tag(name) for name in self.pool.infos}
        for name, lengths, answer in self._shared_out(self._answers((*self.pool.remote, *self.pool.shared))):
            pairs = zip(answer.log_probs, answer.entropies, strict=True)
            scored |= {(row, name): pair for row, pair in zip(lengths, pairs, strict=True)}
            holders += [torch.tensor([tags[name], *pair]) for pair in zip(lengths, answer.holders, strict=True)]
            self.seconds[name] = self.seconds.get(name, 0.0) + answer.seconds
        targets = [self._targets[row] for row in rollouts.row_ids]
        combined = [
            self.router.combined(target, [scored[row, name] for name in target.teachers])
            for row, target in zip(rollouts.row_ids, targets, strict=True)
        ]
        return Scores(
            targets=tuple(targets),
            log_probs=tuple(log_probs for log_probs, _ in combined),
            entropies=tuple(entropies for _, entropies in combined),
            kept=self._kept(holders) if self._how["keep"] else {},
        )

    def metrics(self) -> dict[str, Value]:
        """``router/bytes``, of requests and answers between this rank and teachers on other ranks, and
        ``time/teacher/<name>``; after :meth:`finish`, to be reduced over the student's ranks."""
        spent: dict[str, Value] = {f"time/teacher/{name}": Max(seconds) for name, seconds in self.seconds.items()}
        sent = self.pool.mail.bytes - self._bytes if self.router.student_grid.leads_rows else 0
        return spent | {"router/bytes": Sum(float(sent))}

    def _score_here(self, progress: Callable[[str], None] | None) -> None:
        """Teachers on the student's ranks, in the order of their names."""
        for name in self.pool.shared:
            self._request(name, self._held)
        if set(self.pool.shared) & set(self.pool.reaching):
            self.router.announce(do="score", **self._how)
        away = self.router.offload if any(name in self.pool.teachers for name in self.pool.shared) else None
        if away:
            away.leave()
        self.pool.serve_all(self.pool.shared, **self._how, progress=progress)
        if away:
            away.come_back()

    def _answers(self, names: Sequence[str]) -> torch.Tensor | None:
        """All answers of these teachers, one after the other, on the replica's leader."""
        if not self.router.student_grid.leads_rows:
            return None
        # The replica's other ranks wait in a collective meanwhile; the one that knows what is wrong must end first.
        deadline = time.monotonic() + 0.9 * (self.router.timeout or IDLE.total_seconds())
        # A request without rows is not answered.
        answers = [self._receive(name, deadline) for name in names for lengths in self._requests[name] if lengths]
        return torch.cat([torch.zeros(0), *answers])

    def _receive(self, name: str, deadline: float) -> torch.Tensor:
        self.pool.doing(f"waiting for the scores of {name}", patient=True)
        left = max(0.1, deadline - time.monotonic())
        try:
            return self.pool.mail.receive(source=self.pool.door(name), tag=self.pool.tag(name), timeout=left)
        except Silence as silence:
            raise self.router.no_answer(silence.peer) from None

    def _shared_out(self, flat: torch.Tensor | None) -> list[tuple[str, dict[int, int], Answer]]:
        """(teacher, length of each row, answer) of every request, on every rank of the replica."""
        names = (*self.pool.remote, *self.pool.shared)
        requests = [(name, lengths) for name in names for lengths in self._requests[name] if lengths]
        sizes = [Answer.size(list(lengths.values())) for _, lengths in requests]
        grid, device = self.router.student_grid, compute_device()
        whole = broadcast_flat(
            None if flat is None else flat.to(device),
            numel=sum(sizes),
            dtype=torch.float32,
            device=device,
            src=grid.layout.row_leaders[grid.row_replica],
            group=grid.pg.mp,
        ).cpu()
        return [
            (name, lengths, Answer.unpack(part, list(lengths.values())))
            for (name, lengths), part in zip(requests, whole.split(sizes), strict=True)
        ]

    def _kept(self, holders: Sequence[torch.Tensor]) -> dict[str, KeptStates]:
        """Where every row's states are, of all replicas' rows: a row may be trained on by another replica."""
        names = [name for name, info in self.pool.infos.items() if info.state_kind.name != "none"]
        if not names:
            return {}
        group = self.router.student_grid.row_group
        gathered = all_gather_rows(holders, dtype=torch.int64, device=compute_device(), group=group)
        tables: dict[str, dict[int, int]] = {name: {} for name in names}
        for tag, row, holder in (entry.tolist() for entry in gathered):
            tables[list(self.pool.infos)[tag]][row] = holder
        own = {name: kept.slices for name, kept in self.pool.kept.items()}
        return {name: KeptStates(table, own.get(name, {})) for name, table in tables.items() if table}
