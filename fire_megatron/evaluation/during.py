"""A benchmark in the course of training, answered by the model that trains, on its own grid."""

from __future__ import annotations

import contextlib
import json
from collections import ChainMap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from fire_megatron.config.errors import DataError
from fire_megatron.data.records import Prompt
from fire_megatron.data.tokenizer import Tokenizer
from fire_megatron.evaluation.answering import (
    Answerer,
    Interrupted,
    Row,
    asking,
    own_votes,
    score_answers,
)
from fire_megatron.evaluation.benchmarks import Benchmark
from fire_megatron.evaluation.estimates import Scores
from fire_megatron.evaluation.generations import SCORES, Generation
from fire_megatron.evaluation.heldout import replica_rows
from fire_megatron.evaluation.judge import Judge
from fire_megatron.parallel.collectives import all_gather_objects, on_all_ranks, wait_for_all
from fire_megatron.parallel.grid import ModelGrid
from fire_megatron.platform.files import write_whole
from fire_megatron.rollout.engine import Engine, Progress
from fire_megatron.rollout.sampling import Sampling

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True)
class Exam:
    """A benchmark and what answers it. Every rank of the model's grid has it."""

    benchmark: Benchmark
    prompts: list[Prompt]
    samples: int
    engine: Engine
    sampling: Sampling
    grid: ModelGrid
    tokenizer: Tokenizer
    waiting: dist.ProcessGroup
    """Of the grid's ranks, on the host, for what may take as long as another rank judges."""
    wait: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    """Around what waits for others, however long they take."""

    @property
    def own_rows(self) -> int:
        """Answers that this replica samples."""
        return len(replica_rows(len(self.prompts) * self.samples, self.grid))

    def take(
        self,
        judge: Judge,
        file: Path,
        *,
        writes: bool,
        stopped: Callable[[], bool],
        asked: Callable[[], bool] = lambda: False,
        progress: Progress | None = None,
    ) -> Scores | None:
        """Answer, judge and score. Collective over the grid; the result does not depend on its layout.

        Args:
            judge: of this rank.
            file: for every answer, whole or not there.
            writes: whether this rank writes it; one does.
            stopped: whether the run was asked to stop; collective over the grid, the same on every rank.
            asked: whether this rank was.
            progress: told of sampled tokens.

        Returns:
            The same on every rank; None when the run was asked to stop meanwhile.

        Raises:
            DataError: on every rank: the file cannot be written.
        """
        mine_answered = self._answers(judge, stopped, asked, progress)
        if mine_answered is None:
            return None
        # Texts go to the rank that writes them and nowhere else.
        whole = self._on_first(mine_answered)
        answers = self._merged({key: replace(answer, text="") for key, answer in mine_answered.items()})
        classes = self._merged(own_votes(answers, len(self.prompts), self.samples, judge, self.grid))
        lines = (whole[key].line() for key in sorted(whole))
        with self.wait():
            on_all_ranks(_write, file if writes else None, lines, group=self.waiting)
        return score_answers(answers, classes, len(self.prompts), self.samples)

    def _merged(self, mine: dict[K, V]) -> dict[K, V]:
        """What all ranks have, on every rank, however long some of them take to get here."""
        with self.wait():
            return dict(ChainMap(*all_gather_objects(mine, group=self.waiting)))

    def _on_first(self, mine: dict[K, V]) -> dict[K, V]:
        """What all ranks have, on the grid's first rank, which is the run's; nothing on the others."""
        if self.waiting.size() == 1:
            return mine
        first = self.grid.layout.first_rank
        parts: list[dict[K, V]] | None = [{}] * self.waiting.size() if dist.get_rank() == first else None
        with self.wait():
            dist.gather_object(mine, parts, dst=first, group=self.waiting)
        return dict(ChainMap(*parts)) if parts is not None else {}

    def _answers(
        self, judge: Judge, stopped: Callable[[], bool], asked: Callable[[], bool], progress: Progress | None
    ) -> dict[tuple[int, int], Generation] | None:
        """This replica's answers, on the rank that speaks for it. Replicas that share experts sample in rounds: they
        have to decode together, and so are not asked within one."""
        rows = [Row(0, problem, sample) for problem in range(len(self.prompts)) for sample in range(self.samples)]
        mine = [rows[i] for i in replica_rows(len(rows), self.grid)]
        most, together = -(-len(rows) // self.grid.row_replicas), self.grid.layout.expert > 1
        size = (self.sampling.batch_size if together else 0) or most
        made: dict[tuple[int, int], Generation] = {}

        def sink(_: str, generation: Generation) -> None:
            made[generation.key] = generation

        parts = (self.engine, self.sampling, self.grid, self.tokenizer, [self.benchmark], [self.prompts])
        with Answerer(*parts, judge=judge, sink=sink) as answerer:
            for start in range(0, most, size):
                if self._all_stopped(stopped):
                    return None
                told = progress if together else asking(asked, group=self.grid.pg.mp, progress=progress)
                with contextlib.suppress(Interrupted):  # the others hear of it at the next question
                    answerer.answer(mine[start : start + size], told)
            if self._all_stopped(stopped):
                return None
            answerer.drain()
        return made

    def _all_stopped(self, stopped: Callable[[], bool]) -> bool:
        """Whether the run was asked to stop, once all replicas are here, however long some of them sample: the
        question itself is a collective of the devices, which wait only so long."""
        with self.wait():
            wait_for_all(group=self.waiting)
        return stopped()


def take_exams(
    exams: Sequence[Exam],
    folder: Path,
    *,
    writes: bool,
    stopped: Callable[[], bool],
    asked: Callable[[], bool],
    progress: Callable[[str, int], Progress],
) -> dict[str, float] | None:
    """All benchmarks of a step. Collective over the grid.

    Args:
        exams: one a benchmark.
        folder: for ``<benchmark>.jsonl`` of each and ``scores.json`` of all, which has the intervals too.
        writes: whether this rank writes them.
        stopped: see :meth:`Exam.take`.
        asked: see :meth:`Exam.take`.
        progress: makes what is told of sampled tokens, of a name and the most of them.

    Returns:
        ``eval/<benchmark>/...`` of docs/metrics.md, the same on every rank; None when the run was asked to stop
        meanwhile.
    """
    results: dict[str, Scores] = {}
    if not exams:
        return {}
    with Judge() as judge:
        for exam in exams:
            name = exam.benchmark.name
            told = progress(name, exam.own_rows * exam.sampling.max_new_tokens)
            file = folder / f"{name}.jsonl"
            scores = exam.take(judge, file, writes=writes, stopped=stopped, asked=asked, progress=told)
            if scores is None:
                return None
            results[name] = scores
    report = json.dumps({name: scores.as_dict() for name, scores in results.items()}, indent=2) + "\n"
    on_all_ranks(_write, folder / SCORES if writes else None, [report], group=exams[0].grid.span)
    return {key: value for name, scores in results.items() for key, value in _metrics(name, scores).items()}


def _write(file: Path | None, lines: Iterable[str]) -> None:
    """A file, on the rank that has one to write. Raises DataError: it cannot be written."""
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, lines)
    except OSError as error:
        raise DataError(f"run.dir: {file} cannot be written ({error}); make room and run again") from error


def _metrics(name: str, scores: Scores) -> dict[str, float]:
    n = scores.samples
    values = {f"avg@{n}": scores.average.value, f"maj@{n}": scores.vote.value}
    values |= {f"pass@{k}": estimate.value for k, estimate in scores.passes.items()}
    values |= {"mean_length": scores.mean_length, "truncated": scores.truncated, "unanswered": scores.unanswered}
    return {f"eval/{name}/{key}": value for key, value in values.items()}
