"""Benchmarks in the course of training, answered by the model that trains, on its own grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from fire_megatron.evaluation.generations import MemoryAnswers
from fire_megatron.evaluation.judge import Judge
from fire_megatron.evaluation.runner import Batch, BenchmarkRunner, Interrupted
from fire_megatron.parallel.collectives import wait_for_all
from fire_megatron.rollout.engine import MegatronEngine, Progress


def measure_benchmarks(
    runner: BenchmarkRunner,
    engine: MegatronEngine,
    folder: Path,
    *,
    stopped: Callable[[], bool],
    asked: Callable[[], bool] = lambda: False,
    progress: Callable[[str, int], Progress] | None = None,
) -> dict[str, float] | None:
    """Answer all benchmarks. Collective over the grid; the result does not depend on its layout.

    Args:
        runner: of the run's benchmarks.
        engine: of the model that trains.
        folder: for answers and scores; nothing is written before all answers are there.
        stopped: whether the run was asked to stop; collective over the grid, the same on every rank.
        asked: whether this rank was.
        progress: makes what is told of sampled tokens, of a name and the most of them.

    Returns:
        ``eval/<benchmark>/...`` of docs/metrics.md, the same on every rank; None when the run was asked to stop
        meanwhile.

    Raises:
        DataError: on every rank: the folder cannot be written.
    """
    told = []
    for task in runner.tasks if progress else ():
        told.append(progress(task.name, len(runner.grid.own_rows(len(task.keys))) * task.sampling.max_new_tokens))
    answers = MemoryAnswers()
    with Judge() as judge:
        try:
            runner.sample(engine, judge, _share(runner, stopped), answers, asked=asked, progress=told)
        except Interrupted:
            return None
        scores = runner.score(judge, answers, folder, key="run.dir", about=None)
    return {f"eval/{name}/{key}": value for name, of in scores.items() for key, value in of.metrics().items()}


def _share(runner: BenchmarkRunner, stopped: Callable[[], bool]) -> Iterator[Batch]:
    """A replica's share of all answers, in as many batches as every replica has: one a benchmark, or rounds of
    ``batch_size`` where replicas share experts, since those decode together.

    Raises:
        Interrupted: on every rank: the run was asked to stop.
    """

    def ask() -> None:
        """Once all replicas are here, however long some sample: devices, which agree on it, wait only so long."""
        with runner.patiently():
            wait_for_all(group=runner.waiting)
        if stopped():
            raise Interrupted

    grid = runner.grid
    for number, task in enumerate(runner.tasks):
        keys = task.keys
        mine, most = [keys[i] for i in grid.own_rows(len(keys))], -(-len(keys) // grid.row_replicas)
        size = (task.sampling.batch_size if grid.layout.expert > 1 else 0) or most
        for start in range(0, most, size):
            ask()
            yield Batch(number, mine[start : start + size])
    ask()
