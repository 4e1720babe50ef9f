"""Evaluating a checkpoint: replicas draw answers from one queue until all are written, then the scores are made."""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fire_megatron.checkpoint.loading import load_weights
from fire_megatron.config.schema import RoleConfig
from fire_megatron.data.tokenizer import Tokenizer
from fire_megatron.evaluation.benchmarks import BenchmarkTask
from fire_megatron.evaluation.estimates import BenchmarkScores, table
from fire_megatron.evaluation.generations import PartFiles, only_writer, read_generations, require_settings
from fire_megatron.evaluation.judge import Judge
from fire_megatron.evaluation.runner import Batch, BenchmarkRunner
from fire_megatron.evaluation.source import Source
from fire_megatron.metrics.progress import progress_bar
from fire_megatron.models.build import build_model
from fire_megatron.parallel.collectives import all_gather_objects, on_all_ranks
from fire_megatron.parallel.grid import GridFactory, Layout
from fire_megatron.platform import launch
from fire_megatron.platform.launch import World
from fire_megatron.platform.watch import Watch
from fire_megatron.rollout.engine import MegatronEngine

_FOLDER_DELAY = 120.0
"""Seconds after which a folder on another machine shows what other ranks have written."""
_NUMBERS = itertools.count()
"""One an evaluation of this process: what it keeps in the store goes by it."""


@dataclass(frozen=True, kw_only=True)
class EvaluationJob:
    """What is to be evaluated and how, alike on every rank."""

    source: Source
    tokenizer: Tokenizer
    tasks: Sequence[BenchmarkTask]
    settings: dict[str, Any]
    """What fixes the answers besides model and benchmarks, by option."""
    role: RoleConfig
    out: Path
    timeout: float
    """Seconds before a stalled collective ends the run."""
    begun: datetime
    """When the evaluation was, at its first start."""


class Evaluation:
    """One evaluation on this rank. Every rank makes it and calls it alike."""

    def __init__(self, job: EvaluationJob, world: World, watch: Watch, stopped: Callable[[], str | None]) -> None:
        """Args: stopped: name of the signal that asked this process to stop."""
        self.job, self.world, self.watch, self.stopped = job, world, watch, stopped
        self.store, self._prefix = launch.store(), f"evaluation/{next(_NUMBERS)}"
        factory, parallel = GridFactory(timeout=job.timeout), job.role.parallel
        layout = Layout(tensor=parallel.tensor, pipeline=parallel.pipeline, num_ranks=world.size)
        waiting = factory.cpu_group(range(world.size))
        assert waiting is not None
        patiently = partial(watch.patiently, "waiting for the others")
        self.runner = BenchmarkRunner(job.tasks, job.tokenizer, factory.grid(layout), waiting, patiently)

    def _say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)

    def run(self) -> dict[str, BenchmarkScores] | None:
        """Sample what is missing and score.

        Returns:
            Scores by benchmark; None when the run was asked to stop before all answers were there.

        Raises:
            UserError: on every rank: a folder, model or layout that cannot be used.
        """
        job, parts = self.job, PartFiles(self.job.out, self.world.rank, lambda: self.store.add(self._done, 1))
        with Judge() as judge, ExitStack() as held:
            self.runner.on_first(lambda: held.enter_context(only_writer(job.out)))
            pending = self._pending()
            if pending:
                engine = self._engine()
                with parts, self._progress(sum(len(batch.keys) for batch in pending)):
                    self.watch.doing("sampling")
                    self.runner.sample(engine, judge, self._queue(pending), parts, asked=self._asked)
            missing = self._missing(sum(len(batch.keys) for batch in pending))
            if missing:
                self._say(f"stopped with {missing} answers to go; run again to continue")
                return None
            self.watch.doing("counting votes")
            about = {"model": str(job.source.folder), "settings": job.settings}
            scores = self.runner.score(judge, parts, job.out, key="--out", about=about)
        self._say(f"\n% right, with 95% intervals over problems\n{table(scores)}\nwritten to {job.out}")
        return scores

    # ---- what is there ----------------------------------------------------------------------------------------

    @property
    def _done(self) -> str:
        """Where the store counts the answers that all ranks have written."""
        return f"{self._prefix}/done"

    def _unanswered(self) -> list[Batch]:
        """What the folder does not hold yet, in batches of one benchmark."""
        batches = []
        for number, task in enumerate(self.job.tasks):
            held = read_generations(self.job.out, task.name)
            keys = [key for key in task.keys if key not in held]
            size = task.sampling.batch_size or -(-len(keys) // self.runner.grid.row_replicas) or 1
            batches += [Batch(number, keys[start : start + size]) for start in range(0, len(keys), size)]
        return batches

    def _pending(self) -> list[Batch]:
        """What is still to be sampled, as rank 0 sees the folder."""
        job, source = self.job, self.job.source
        digests = {task.name: task.benchmark.digest for task in job.tasks}
        model = (str(source.folder), source.fingerprint)
        self.runner.on_first(lambda: require_settings(job.out, *model, job.settings, digests, job.begun))
        pending = self.runner.gather(self.runner.on_first(self._unanswered))[0] or []
        total, missing = sum(len(task.keys) for task in job.tasks), sum(len(batch.keys) for batch in pending)
        if 0 < missing < total:
            self._say(f"{job.out} holds {total - missing} of {total} answers already")
        return pending

    def _missing(self, pending: int) -> int:
        """Answers that are not there after so many were to be sampled."""

        def count() -> int:
            expected = pending - self.store.add(self._done, 0)
            deadline = time.monotonic() + _FOLDER_DELAY
            while True:
                missing = sum(len(batch.keys) for batch in self._unanswered())
                if missing <= expected or time.monotonic() > deadline:
                    return missing
                time.sleep(1.0)

        return self.runner.gather(self.runner.on_first(count))[0] or 0

    # ---- sampling ---------------------------------------------------------------------------------------------

    def _asked(self) -> bool:
        return self.stopped() is not None

    def _queue(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        """Batches that all replicas draw from: which is next stands in the store. When a rank of a replica was asked to
        stop, all replicas do."""
        grid, stopped = self.runner.grid, f"{self._prefix}/stopped"
        while True:
            number = len(batches)
            if grid.leads_rows and not self.store.check([stopped]):
                number = self.store.add(f"{self._prefix}/taken", 1) - 1
            numbers, asked = zip(*all_gather_objects((number, self._asked()), group=grid.pg.mp), strict=True)
            if any(asked):
                self.store.set(stopped, "")
            if any(asked) or min(numbers) >= len(batches):
                return
            yield batches[min(numbers)]

    @contextmanager
    def _progress(self, total: int) -> Iterator[None]:
        """Rank 0 shows how many answers all replicas have written: a bar, or now and then a line."""
        end, store = threading.Event(), launch.store()

        def show() -> None:
            with progress_bar(total=total, desc="answers", unit="answer") as bar:
                while not end.wait(0.5):
                    bar.update(store.add(self._done, 0) - bar.n)
                bar.update(store.add(self._done, 0) - bar.n)

        thread = threading.Thread(target=show, daemon=True)
        if self.world.is_main:
            thread.start()
        try:
            yield
        finally:
            end.set()
            if self.world.is_main:
                thread.join()

    def _engine(self) -> MegatronEngine:
        """The model, loaded. A Hugging Face model is converted into a folder that goes as soon as it is loaded."""
        role, source, grid, device = self.job.role, self.job.source, self.runner.grid, self.world.device
        folder = self.job.out / ".converted"
        try:
            self.runner.on_first(lambda: source.converted(folder))
            self.watch.doing("loading")
            model = on_all_ranks(build_model, source.shape, role, grid, device=device, group=dist.group.WORLD)
            load_weights(model, folder if source.is_hf else source.folder, grid=grid)
        finally:
            if self.world.is_main:
                shutil.rmtree(folder, ignore_errors=True)
        return MegatronEngine(model, grid)
