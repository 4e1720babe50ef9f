"""Every teacher of a run, and this rank's part of those that it holds.

Requests for a teacher come from the student's row replicas to the teacher's door, its first rank, which passes them on
within the teacher's span; answers go back the same way. A request is answered by all ranks of the span together, so
ranks that hold several teachers serve them in one order that all ranks know (:meth:`TeacherPool.schedule`).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist

from fire_megatron.data.rollouts import KeptStates
from fire_megatron.parallel.collectives import broadcast_flat
from fire_megatron.parallel.control import Control
from fire_megatron.parallel.grid import GridFactory, Layout, ModelGrid
from fire_megatron.parallel.mail import Mail
from fire_megatron.platform.offload import Offload
from fire_megatron.teachers.messages import Answer, Rows
from fire_megatron.teachers.teacher import Keep, Teacher, TeacherInfo


class TeacherPool:
    """Serves requests on the ranks that hold teachers, and knows where every teacher is on all of them."""

    def __init__(
        self,
        infos: Mapping[str, TeacherInfo],
        teachers: Mapping[str, Teacher],
        *,
        student_grid: ModelGrid,
        factory: GridFactory,
        doing: Callable[..., None] = lambda what, patient=False: None,
    ) -> None:
        """Collective over the world.

        Args:
            infos: every teacher by name.
            teachers: this rank's parts, by name.
            student_grid: the student's, also on ranks that hold none of it.
            factory: makes the groups for messages.
            doing: is told what this rank does, and whether it waits for another role (:meth:`Watch.doing`).
        """
        self.infos, self.teachers = dict(sorted(infos.items())), dict(teachers)
        self.student: Layout = student_grid.layout
        self.leaders = self.student.row_leaders
        students = set(self.student.ranks)
        layouts = {name: info.layout for name, info in self.infos.items()}
        self.remote = tuple(name for name, layout in layouts.items() if students.isdisjoint(layout.ranks))
        """Teachers that share no rank with the student: they score while it samples."""
        self.shared = tuple(name for name in layouts if name not in self.remote)
        """The others, which score when it has sampled."""
        self.reaching = tuple(name for name, layout in layouts.items() if not students.issuperset(layout.ranks))
        """Teachers with ranks that hold none of the student and have to be told what to do."""
        doors = [layout.first_rank for layout in layouts.values()]
        self.mail = Mail(
            factory.cpu_group([*self.leaders, *doors]), itertools.product(self.leaders, doors), doing=doing
        )
        self._spans = {name: factory.cpu_group(layout.ranks) for name, layout in layouts.items()}
        self._tags = {name: tag for tag, name in enumerate(self.infos)}
        self.doing = doing
        self._resident: Offload | None = None
        self._loads: dict[str, list[int]] = {}
        self.kept: dict[str, KeptStates] = {}
        """What this rank keeps of the rows of the step."""

    def door(self, name: str) -> int:
        """Global rank that takes a teacher's requests."""
        return self.infos[name].layout.first_rank

    def tag(self, name: str) -> int:
        """Of a teacher's messages."""
        return self._tags[name]

    def schedule(self, rounds: int) -> list[str]:
        """The teachers apart from the student, once a round, in the order in which a rank serves those that it holds.
        One whose weights come from the host is served in one go, so that they come once."""
        staying = [name for name in self.remote if not self.infos[name].offload]
        coming = [name for name in self.remote if self.infos[name].offload]
        return staying * rounds + [name for name in coming for _ in range(rounds)]

    def begin(self, timeout: float | None = None) -> None:
        """Forget the rows of the step before, whose answers have all arrived.

        Raises:
            Silence: a teacher that had no rows has not even taken the request, for so many seconds.
        """
        self.mail.flush(timeout)
        self.kept = {}
        for teacher in self.teachers.values():
            teacher.forget()
        self._loads = {name: [0] * info.layout.data for name, info in self.infos.items()}

    def serve(self, name: str, *, keep: bool, temperature: float = 1.0) -> None:
        """Answer one request of every row replica of the student. Collective over the teacher's span, together with a
        message from each of the replicas' leaders; a no-op on other ranks.

        Args:
            name: the teacher.
            keep: whether to keep states of the rows, if the loss needs any.
            temperature: of the log-probabilities (:meth:`Teacher.score`).
        """
        if name not in self.teachers:
            return
        self.doing(f"waiting for answers to score as {name}", patient=True)
        parts = self._requests(name)
        rows = Rows.merged(parts)
        if not rows.ids:
            return
        self.doing(f"scoring as {name}")
        started, teacher = time.perf_counter(), self.teachers[name]
        self._bring(teacher.offload)
        scored = teacher.score(
            rows.prompts,
            rows.responses,
            keep=Keep(rows.ids, self.student.tensor) if keep else None,
            loads=self._loads[name],
            temperature=temperature,
        )
        seconds = time.perf_counter() - started
        if scored.kept is not None:
            have = self.kept.get(name, KeptStates({}, {}))
            self.kept[name] = KeptStates({**have.holder, **scored.kept.holder}, {**have.slices, **scored.kept.slices})
        if dist.get_rank() != self.door(name):
            return
        places = {row: place for place, row in enumerate(rows.ids)}
        holder = {} if scored.kept is None else scored.kept.holder
        for leader, part in zip(self.leaders, parts, strict=True):
            if part.ids:
                at = [places[row] for row in part.ids]
                answer = Answer(
                    [scored.log_probs[i] for i in at],
                    [scored.entropies[i] for i in at],
                    [holder.get(row, 0) for row in part.ids],
                    seconds,
                )
                self.mail.send(answer.pack(), to=leader, tag=self.tag(name))

    def _requests(self, name: str) -> list[Rows]:
        """The request of each row replica, on every rank of the teacher's span."""
        at_door = dist.get_rank() == self.door(name)
        flats = [self.mail.receive(source=leader, tag=self.tag(name)) for leader in self.leaders] if at_door else []
        sizes = self._tell(name, torch.tensor([len(flat) for flat in flats]), len(self.leaders), torch.int64)
        flat = self._tell(name, torch.cat(flats) if flats else None, int(sizes.sum()), torch.int32)
        return [Rows.unpack(part) for part in flat.split(sizes.tolist())]

    def _tell(self, name: str, values: torch.Tensor | None, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """From the door to the rest of the span."""
        group = self._spans[name]
        assert group is not None
        return broadcast_flat(
            values, numel=numel, dtype=dtype, device=torch.device("cpu"), src=self.door(name), group=group
        )

    def _bring(self, offload: Offload | None) -> None:
        """Have a teacher's weights on the device, and no other's that wait on the host."""
        if offload is not self._resident and self._resident is not None:
            self._resident.leave()
        if offload is not None:
            offload.come_back()
        self._resident = offload

    def serve_all(
        self,
        names: Iterable[str],
        *,
        keep: bool,
        temperature: float = 1.0,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        """:meth:`serve` these in turn; ``progress`` is told of each that this rank holds."""
        for name in names:
            if progress and name in self.teachers:
                progress(name)
            self.serve(name, keep=keep, temperature=temperature)
        self._bring(None)

    def obey(
        self,
        control: Control,
        attach: Callable[[str], None],
        *,
        idle: Callable[[], None],
        done: Callable[[], None] = lambda: None,
    ) -> str | None:
        """The life of a rank that holds teachers and none of the student: do as the student says, until it says stop.

        Args:
            control: the student's orders.
            attach: sends what this rank keeps as a teacher (:meth:`Transfer.serve`).
            idle: called between orders, and about once a second while there is none.
            done: called after each order.

        Returns:
            Why the run ends, if not because it is done.
        """
        while True:
            idle()
            self.doing("waiting for the student", patient=True)
            order = control.wait(idle)
            match order["do"]:
                case "sample":
                    self.begin()
                    self.serve_all(self.schedule(order["rounds"]), keep=order["keep"], temperature=order["temperature"])
                case "score":
                    self.serve_all(self.shared, keep=order["keep"], temperature=order["temperature"])
                case "attach":
                    for name in order["teachers"]:
                        attach(name)
                case "stop":
                    return order["error"]
            done()

    def table(self, name: str, table: torch.Tensor | None) -> torch.Tensor | None:
        """Pass a table from the student's ranks on to all ranks of one of the teachers that are :attr:`reaching`.

        Args:
            name: the teacher.
            table: 1-D int64, on the student's ranks; None on others.
        """
        me, door, source = dist.get_rank(), self.door(name), self.student.first_rank
        if me == source:
            assert table is not None
            self.mail.send(table, to=door, tag=self.tag(name))
        if name not in self.teachers:
            return table
        at_door = self.mail.receive(source=source, tag=self.tag(name)) if me == door else None
        size = self._tell(name, None if at_door is None else torch.tensor([len(at_door)]), 1, torch.int64)
        return self._tell(name, at_door, int(size), torch.int64)
