"""The benchmark runner: answers are sampled, judged while the engine samples on, scored and written.

Training and the command line run it alike. They differ in where a replica's batches come from (a share of its own, or a
queue that all replicas draw from) and in where judged answers go (memory, or files that outlive the process).
"""

from __future__ import annotations

import contextlib
from collections import ChainMap, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from fire_megatron.data.tokenizer import Tokenizer
from fire_megatron.evaluation.answers import last_boxed, thinking
from fire_megatron.evaluation.benchmarks import BenchmarkTask
from fire_megatron.evaluation.estimates import BenchmarkScores, score
from fire_megatron.evaluation.generations import Generation, Key, MemoryAnswers, PartFiles, write_answers, write_scores
from fire_megatron.evaluation.judge import Judge
from fire_megatron.parallel.collectives import all_gather_objects, largest, on_all_ranks
from fire_megatron.parallel.grid import ModelGrid
from fire_megatron.rollout.engine import MegatronEngine, Progress

_TEMPLATE_END = 16
"""Tokens of a prompt in which a chat template may begin the thinking."""
_ASK_EVERY = 16
"""How often progress is told between two questions to the ranks of a replica whether one was asked to stop."""
K = TypeVar("K")
V = TypeVar("V")


class Batch(NamedTuple):
    """Answers to one benchmark that a replica samples in one call."""

    task: int
    """Place in the list of tasks."""
    keys: Sequence[Key]


class Interrupted(Exception):
    """A rank was asked to stop: a replica leaves the batch that it samples, or all of them give the evaluation up."""


@dataclass(frozen=True)
class BenchmarkRunner:
    """Benchmarks and the ranks that answer them. Every rank of the grid has it and calls it alike."""

    tasks: Sequence[BenchmarkTask]
    """At least one."""
    tokenizer: Tokenizer
    grid: ModelGrid
    waiting: dist.ProcessGroup
    """Of the grid's ranks, on the host, for what may take as long as another rank samples or judges."""
    patiently: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    """Around what waits for others, however long they take."""

    @property
    def is_first(self) -> bool:
        """Whether this is the grid's first rank, which reads and writes."""
        return dist.get_rank() == self.grid.layout.first_rank

    # ---- answers ----------------------------------------------------------------------------------------------

    def sample(
        self,
        engine: MegatronEngine,
        judge: Judge,
        source: Iterable[Batch],
        sink: MemoryAnswers | PartFiles,
        *,
        asked: Callable[[], bool],
        progress: Sequence[Progress] = (),
    ) -> None:
        """Answer a source's batches. Answers go to the sink as they are finished, on the rank that speaks for their
        replica and on a thread of their own.

        Args:
            engine: of the grid's model.
            judge: of this rank.
            source: batches of this replica, the same on each of its ranks; ends early, or raises
                Interrupted to have all answers given up, when the run is asked to stop.
            sink: for the answers.
            asked: whether this rank was asked to stop; its replica then leaves the batch in progress, and draws again.
            progress: of each task, told of sampled tokens.

        Raises:
            UserError: an answer cannot be written: on this rank alone, or on every rank once all have sampled.
        """
        pending: deque[Future[None]] = deque()

        def settle(*, wait: bool) -> None:
            while pending and (wait or pending[0].done()):
                pending.popleft().result()

        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="judging") as pool:

            def finished(task: BenchmarkTask, key: Key, response: torch.Tensor) -> None:
                judged = pool.submit(lambda: sink.add(task.name, self._judged(task, key, response.tolist(), judge)))
                pending.append(judged)

            try:
                for batch in source:
                    tell = self._asking(asked, progress[batch.task] if progress else None)
                    with contextlib.suppress(Interrupted):  # the source hears of it at the next question
                        self._answer(batch, engine, finished, tell)
                    settle(wait=False)
            except Interrupted:  # answers of an evaluation that is given up need not be judged
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            with self.patiently():
                on_all_ranks(settle, wait=True, group=self.waiting)

    def _answer(
        self,
        batch: Batch,
        engine: MegatronEngine,
        finished: Callable[[BenchmarkTask, Key, torch.Tensor], None],
        progress: Progress | None,
    ) -> None:
        task = self.tasks[batch.task]
        by_id = {task.benchmark.row_id(*key): key for key in batch.keys}

        def hand_over(ids: Sequence[int], responses: Sequence[torch.Tensor]) -> None:
            if self.grid.leads_rows:
                for row_id, response in zip(ids, responses, strict=True):
                    finished(task, by_id[row_id], response)

        with engine.model.rotary_angles.fixed(task.longest_row):  # also where the run's rows are shorter
            engine.generate(
                [task.prompts[problem] for problem, _ in batch.keys],
                list(by_id),
                sampling=task.sampling,
                step=0,
                progress=progress,
                finished=hand_over,
                group_size=1,
            )

    def _asking(self, asked: Callable[[], bool], progress: Progress | None) -> Progress | None:
        """Progress that leaves the sampling soon after a rank of the replica was asked to stop. Replicas that share
        experts have to decode together, and so are not asked meanwhile."""
        if self.grid.layout.expert > 1:
            return progress
        calls = 0

        def ask(tokens: int) -> None:
            nonlocal calls
            calls += 1
            if progress is not None:
                progress(tokens)
            if calls % _ASK_EVERY == 0 and any(largest(int(asked()), group=self.grid.pg.mp)):
                raise Interrupted

        return ask

    def _judged(self, task: BenchmarkTask, key: Key, response: list[int], judge: Judge) -> Generation:
        text, right = self.tokenizer.decode(response), task.benchmark.problems[key[0]].answer
        before = self.tokenizer.decode(task.prompts[key[0]].token_ids[-_TEMPLATE_END:])
        answer = last_boxed(text if thinking(before) is None else f"<think>{text}")
        return Generation(
            problem=key[0],
            sample=key[1],
            seed=task.sampling.seed,
            text=text,
            answer=answer,
            right=right,
            correct=judge.equal(right, answer),
            math_verify=judge.published_verdict(right, text),
            tokens=len(response),
            truncated=not response or response[-1] not in task.sampling.stop_ids,
        )

    # ---- scores -----------------------------------------------------------------------------------------------

    def score(
        self, judge: Judge, sink: MemoryAnswers | PartFiles, folder: Path, *, key: str, about: dict[str, Any] | None
    ) -> dict[str, BenchmarkScores]:
        """Score what the sinks of all ranks hold, the same in any layout, and write it.

        Args:
            judge: of this rank; votes are counted on all replicas, each for its share of the problems.
            sink: holds, over all ranks, the answers that the tasks ask for and perhaps more.
            folder: for ``<benchmark>.jsonl`` of every answer and ``scores.json``, which has the intervals too.
            key: the setting that names the folder, for messages.
            about: what else is in ``scores.json``; without, it is the scores alone.

        Returns:
            By benchmark, the same on every rank.

        Raises:
            DataError: on every rank: the folder cannot be written.
        """
        results: dict[str, BenchmarkScores] = {}
        for task in self.tasks:
            held = sink.held(task.name)
            whole = self._on_first(held)  # texts go to the rank that writes them and nowhere else
            answers = self._merged({place: replace(answer, text="") for place, answer in held.items()})
            results[task.name] = self._score(task, answers, judge)
            self.on_first(partial(write_answers, folder, key, task.name, whole))
        scores = {name: result.as_dict() for name, result in results.items()}
        report = scores if about is None else {**about, "benchmarks": scores}
        self.on_first(partial(write_scores, folder, key, report))
        return results

    def _score(self, task: BenchmarkTask, answers: Mapping[Key, Generation], judge: Judge) -> BenchmarkScores:
        rows = [[answers[problem, sample] for sample in range(task.samples)] for problem in range(len(task.prompts))]
        mine = self.grid.own_rows(len(rows)) if self.grid.leads_rows else ()
        classes = self._merged({problem: _vote_classes(rows[problem], judge) for problem in mine})
        correct, published, tokens, truncated = (
            np.array([[getattr(answer, name) for answer in row] for row in rows])
            for name in ("correct", "math_verify", "tokens", "truncated")
        )
        return score(correct, published, [classes[problem] for problem in range(len(rows))], tokens, truncated)

    # ---- between ranks ----------------------------------------------------------------------------------------

    def on_first(self, action: Callable[[], V]) -> V | None:
        """Do something that may find a user's mistake on the first rank alone, while the others wait, however long it
        takes; they get None, or all of them raise."""
        if self.is_first:
            return on_all_ranks(action, group=self.waiting)
        with self.patiently():
            return on_all_ranks(lambda: None, group=self.waiting)

    def gather(self, value: V) -> list[V]:
        """Every rank's, however long some of them take to get here."""
        with self.patiently():
            return all_gather_objects(value, group=self.waiting)

    def _merged(self, mine: dict[K, V]) -> dict[K, V]:
        """What all ranks have, on every rank."""
        return dict(ChainMap(*self.gather(mine)))

    def _on_first(self, mine: dict[K, V]) -> dict[K, V]:
        """What all ranks have, on the first rank; nothing on the others."""
        if self.waiting.size() == 1:
            return mine
        parts: list[dict[K, V]] | None = [{}] * self.waiting.size() if self.is_first else None
        with self.patiently():
            dist.gather_object(mine, parts, dst=self.grid.layout.first_rank, group=self.waiting)
        return dict(ChainMap(*parts)) if parts is not None else {}


def _vote_classes(row: Sequence[Generation], judge: Judge) -> list[int | None]:
    """Number of each answer's class of equal ones, None without an answer; right ones are -1."""
    wrong = iter(judge.classes([answer.answer for answer in row if not answer.correct]))
    return [-1 if answer.correct else next(wrong) for answer in row]
