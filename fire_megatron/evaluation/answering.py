"""Answers to benchmarks: sampled by a rollout engine and judged while it samples on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.distributed as dist

from fire_megatron.data.records import Prompt
from fire_megatron.data.tokenizer import Tokenizer
from fire_megatron.evaluation.answers import last_boxed
from fire_megatron.evaluation.benchmarks import Benchmark
from fire_megatron.evaluation.estimates import Scores, score
from fire_megatron.evaluation.generations import Generation
from fire_megatron.evaluation.heldout import replica_rows
from fire_megatron.evaluation.judge import Judge
from fire_megatron.parallel.collectives import largest
from fire_megatron.parallel.grid import ModelGrid
from fire_megatron.rollout.engine import Engine, Progress
from fire_megatron.rollout.sampling import Sampling

Sink = Callable[[str, Generation], None]
"""Takes a benchmark's name and an answer to it, in a thread of its own."""
_ASK_EVERY = 16
"""How often progress is told between two questions to the ranks of a replica whether one was asked to stop."""


class Row(NamedTuple):
    """One answer to be sampled."""

    benchmark: int
    """Place in the list of benchmarks."""
    problem: int
    sample: int


class Answerer:
    """Samples rows on this rank's replica. The rank that speaks for the replica judges and hands over."""

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling,
        grid: ModelGrid,
        tokenizer: Tokenizer,
        benchmarks: Sequence[Benchmark],
        prompts: Sequence[Sequence[Prompt]],
        *,
        judge: Judge,
        sink: Sink,
    ) -> None:
        """Args: prompts: of each benchmark's problems; sink: is given each answer as soon as it is finished."""
        self.engine, self.sampling, self.grid, self.tokenizer = engine, sampling, grid, tokenizer
        self.benchmarks, self.prompts = benchmarks, prompts
        self.judge, self.sink = judge, sink
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="judging")
        self._pending: list[Future[None]] = []

    def answer(self, rows: Sequence[Row], progress: Progress | None = None) -> None:
        """Sample these rows together. Every rank of the replica calls it alike, with the same rows.

        Raises:
            Exception: what handing over an earlier answer has raised.
        """
        by_id = {self.benchmarks[row.benchmark].row_id(row.problem, row.sample): row for row in rows}

        def finished(ids: Sequence[int], responses: Sequence[torch.Tensor]) -> None:
            if self.grid.leads_rows:
                for row_id, response in zip(ids, responses, strict=True):
                    self._pending.append(self._pool.submit(self._hand_over, by_id[row_id], response.tolist()))

        self.engine.generate(
            [self.prompts[row.benchmark][row.problem] for row in rows],
            list(by_id),
            sampling=self.sampling,
            step=0,
            progress=progress,
            finished=finished,
            group_size=1,
        )
        done, self._pending = self._pending, []
        for future in done:
            if future.done():
                future.result()
            else:
                self._pending.append(future)

    def _hand_over(self, row: Row, response: list[int]) -> None:
        benchmark = self.benchmarks[row.benchmark]
        text, right = self.tokenizer.decode(response), benchmark.problems[row.problem].answer
        answer = last_boxed(text)
        self.sink(
            benchmark.name,
            Generation(
                problem=row.problem,
                sample=row.sample,
                seed=self.sampling.seed,
                text=text,
                answer=answer,
                right=right,
                correct=self.judge.equal(right, answer),
                tokens=len(response),
                truncated=not response or response[-1] not in self.sampling.stop_ids,
            ),
        )

    def drain(self) -> None:
        """Wait until every finished answer has been handed over.

        Raises:
            Exception: what handing over has raised.
        """
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """End the thread, once it has handed over what is finished."""
        self._pool.shutdown(wait=True)


class Interrupted(Exception):
    """A rank of the replica was asked to stop while it sampled."""


def asking(asked: Callable[[], bool], *, group: dist.ProcessGroup, progress: Progress | None = None) -> Progress:
    """Progress that leaves the sampling soon after a rank of the replica was asked to stop. What is finished by then
    has been handed over.

    Args:
        asked: whether this rank was.
        group: the ranks of the replica, which sample together and call this alike.
        progress: told as well.

    Raises:
        Interrupted: by what is returned, on every rank of the group.
    """
    calls = 0

    def ask(tokens: int) -> None:
        nonlocal calls
        calls += 1
        if progress is not None:
            progress(tokens)
        if calls % _ASK_EVERY == 0 and largest(int(asked()), group=group):
            raise Interrupted

    return ask


Answers = Mapping[tuple[int, int], Generation]
"""Of one benchmark, by (problem, sample)."""


def vote_classes(answers: Answers, problem: int, samples: int, judge: Judge) -> list[int | None]:
    """Number of each sample's class of equal answers, None without an answer; right ones are -1."""
    generations = [answers[problem, sample] for sample in range(samples)]
    wrong = iter(judge.classes([g.answer for g in generations if not g.correct]))
    return [-1 if g.correct else next(wrong) for g in generations]


def own_votes(
    answers: Answers, problems: int, samples: int, judge: Judge, grid: ModelGrid
) -> dict[int, list[int | None]]:
    """:func:`vote_classes` of this replica's share of the problems, on the rank that speaks for it."""
    mine = replica_rows(problems, grid) if grid.leads_rows else ()
    return {problem: vote_classes(answers, problem, samples, judge) for problem in mine}


def score_answers(answers: Answers, classes: Mapping[int, Sequence[int | None]], problems: int, samples: int) -> Scores:
    """Scores of a benchmark.

    Args:
        answers: at least those of its first ``problems`` and ``samples``.
        classes: :func:`vote_classes` of each problem.
        problems: to count.
        samples: of each problem.
    """
    rows = [[answers[problem, sample] for sample in range(samples)] for problem in range(problems)]
    return score(
        np.array([[g.correct for g in row] for row in rows]),
        [classes[problem] for problem in range(problems)],
        np.array([[g.tokens for g in row] for row in rows]),
        np.array([[g.truncated for g in row] for row in rows]),
    )
