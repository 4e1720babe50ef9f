"""Evaluating a checkpoint: replicas draw answers from one queue until all are written, then the scores are made."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import threading
import time
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from fire_megatron.checkpoint.load import load_weights
from fire_megatron.config.errors import DataError
from fire_megatron.config.schema import ParallelConfig, PrecisionConfig, RoleConfig
from fire_megatron.data.records import Prompt
from fire_megatron.data.tokenizer import Tokenizer
from fire_megatron.evaluation.answering import Answerer, Interrupted, Row, asking, own_votes, score_answers
from fire_megatron.evaluation.benchmarks import Benchmark
from fire_megatron.evaluation.estimates import Scores, table
from fire_megatron.evaluation.generations import (
    SCORES,
    Generation,
    PartWriter,
    merge_parts,
    only_writer,
    read_generations,
    require_settings,
)
from fire_megatron.evaluation.judge import Judge
from fire_megatron.evaluation.source import Source
from fire_megatron.models.build import build_model
from fire_megatron.parallel.collectives import all_gather_objects, everywhere, on_all_ranks
from fire_megatron.parallel.grid import GridFactory, Layout, ModelGrid
from fire_megatron.platform import launch
from fire_megatron.platform.files import write_whole
from fire_megatron.platform.launch import World
from fire_megatron.platform.watch import Watch
from fire_megatron.rollout.engine import MegatronEngine
from fire_megatron.rollout.sampling import Sampling

_FOLDER_DELAY = 120.0
"""Seconds after which a folder on another machine shows what other ranks have written."""
_NUMBERS = itertools.count()
"""One an evaluation of this process: what it keeps in the store goes by it."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to evaluate."""

    samples: int
    """Answers to each problem."""
    temperature: float
    top_p: float
    max_new_tokens: int
    batch_size: int
    """Answers that a replica samples together."""
    seed: int
    dtype: str
    tensor: int
    pipeline: int
    out: Path
    timeout: float
    """Seconds before a stalled collective ends the run."""


@dataclass(frozen=True)
class Work:
    """What is to be evaluated, alike on every rank."""

    source: Source
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    """Tokens that end an answer."""
    benchmarks: Sequence[Benchmark]
    prompts: Sequence[Sequence[Prompt]]
    settings: dict[str, Any]
    """What fixes the answers besides model and benchmarks, by option."""


class Evaluation:
    """One evaluation on this rank. Every rank makes it and calls it alike."""

    def __init__(
        self, work: Work, options: Options, world: World, watch: Watch, stopped: Callable[[], str | None]
    ) -> None:
        """Args: stopped: name of the signal that asked this process to stop."""
        self.work, self.options, self.world, self.watch, self.stopped = work, options, world, watch, stopped
        self.store, self._keys = launch.store(), f"evaluation/{next(_NUMBERS)}"
        self.factory = GridFactory(timeout=options.timeout)
        layout = Layout(tensor=options.tensor, pipeline=options.pipeline, num_ranks=world.size)
        self.grid: ModelGrid = self.factory.grid(layout)
        group = self.factory.cpu_group(range(world.size))
        assert group is not None
        self.waiting = group
        """Of all ranks, for what may take as long as a replica samples."""
        self.judge = everywhere(Judge)

    def _say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)

    def _gather(self, value: T) -> list[T]:
        """Every rank's, however long some of them take to get here."""
        self.watch.doing("waiting for the others", patient=True)
        return all_gather_objects(value, group=self.waiting)

    def _on_main(self, action: Callable[..., T], *arguments: Any) -> T | None:
        """Do something that may find a user's mistake on rank 0 alone, while the others wait, however long it takes;
        they get None, or all of them raise."""
        if self.world.is_main:
            return on_all_ranks(action, *arguments, group=self.waiting)
        self.watch.doing("waiting for rank 0", patient=True)
        return on_all_ranks(lambda: None, group=self.waiting)

    def run(self) -> dict[str, Scores] | None:
        """Sample what is missing and score.

        Returns:
            Scores by benchmark; None when the run was asked to stop before all answers were there.

        Raises:
            UserError: on every rank: a folder, model or layout that cannot be used.
        """
        with self.judge, ExitStack() as held:
            self._on_main(lambda: held.enter_context(only_writer(self.options.out)))
            pending = self._pending()
            if pending:
                self._sample(pending)
            missing = self._missing(len(pending))
            if missing:
                self._say(f"stopped with {missing} answers to go; run again to continue")
                return None
            scores = self._score()
            self._on_main(self._report, scores)
        return scores

    # ---- what is there ----------------------------------------------------------------------------------------

    def _rows(self) -> Iterator[Row]:
        """Every answer, those to one problem together."""
        for place, benchmark in enumerate(self.work.benchmarks):
            for problem in range(len(benchmark.problems)):
                for sample in range(self.options.samples):
                    yield Row(place, problem, sample)

    def _unanswered(self) -> list[Row]:
        held = [read_generations(self.options.out, benchmark.name) for benchmark in self.work.benchmarks]
        return [row for row in self._rows() if (row.problem, row.sample) not in held[row.benchmark]]

    def _pending(self) -> list[Row]:
        """Rows that are still to be sampled, as rank 0 sees the folder."""
        digests = {benchmark.name: benchmark.digest for benchmark in self.work.benchmarks}
        source = self.work.source
        self._on_main(
            require_settings, self.options.out, str(source.folder), source.fingerprint, self.work.settings, digests
        )
        pending: list[Row] = self._gather(self._on_main(self._unanswered))[0] or []
        total = sum(1 for _ in self._rows())
        if 0 < len(pending) < total:
            self._say(f"{self.options.out} holds {total - len(pending)} of {total} answers already")
        return pending

    def _missing(self, pending: int) -> int:
        """Answers that are not there after so many were to be sampled."""

        def count() -> int:
            expected = pending - self.store.add(f"{self._keys}/done", 0)
            deadline = time.monotonic() + _FOLDER_DELAY
            while (missing := len(self._unanswered())) > expected and time.monotonic() < deadline:
                time.sleep(1.0)
            return missing

        return self._gather(self._on_main(count))[0] or 0

    # ---- sampling ---------------------------------------------------------------------------------------------

    def _sample(self, pending: Sequence[Row]) -> None:
        """Answer the rows, or as many as there is time for."""
        options, work = self.options, self.work
        engine = self._engine()
        sampling = Sampling(
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
            stop_ids=frozenset(work.stop_ids),
        )
        parts: dict[str, PartWriter] = {}

        def sink(name: str, generation: Generation) -> None:
            if name not in parts:
                parts[name] = files.enter_context(PartWriter(options.out, name, self.world.rank))
            parts[name].write(generation)
            self.store.add(f"{self._keys}/done", 1)

        with (
            ExitStack() as files,
            Answerer(
                engine, sampling, self.grid, work.tokenizer, work.benchmarks, work.prompts, judge=self.judge, sink=sink
            ) as answerer,
            self._progress(len(pending)),
        ):
            self.watch.doing("sampling")
            try:
                while (rows := self._take(pending)) is not None:
                    answerer.answer(rows, asking(self._asked, group=self.grid.pg.mp))
            except Interrupted:
                self.store.set(f"{self._keys}/stopped", "")
            self.watch.doing("waiting for the others", patient=True)
            on_all_ranks(answerer.drain, group=self.waiting)

    def _asked(self) -> bool:
        return self.stopped() is not None

    def _take(self, pending: Sequence[Row]) -> Sequence[Row] | None:
        """The replica's next rows from the queue that all share; None at its end, or when another replica has stopped.

        Raises:
            Interrupted: on every rank of the replica, if one of them was asked to stop.
        """
        start = len(pending)
        if self.grid.leads_rows and not self.store.check([f"{self._keys}/stopped"]):
            start = (self.store.add(f"{self._keys}/taken", 1) - 1) * self.options.batch_size
        starts, asked = zip(*all_gather_objects((start, self._asked()), group=self.grid.pg.mp), strict=True)
        if any(asked):
            raise Interrupted
        start = min(starts)
        return pending[start : start + self.options.batch_size] or None

    @contextmanager
    def _progress(self, total: int) -> Iterator[None]:
        """Rank 0 shows how many answers all replicas have written: a bar, or now and then a line."""
        end, store = threading.Event(), launch.store()
        terminal = sys.stderr.isatty()

        def show() -> None:
            with tqdm(total=total, desc="answers", unit="answer", mininterval=0.2 if terminal else 30.0) as bar:
                while not end.wait(0.5):
                    bar.update(store.add(f"{self._keys}/done", 0) - bar.n)
                bar.update(store.add(f"{self._keys}/done", 0) - bar.n)

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
        options, source = self.options, self.work.source
        role = RoleConfig(
            checkpoint=str(source.folder),
            parallel=ParallelConfig(tensor=options.tensor, pipeline=options.pipeline),
            precision=PrecisionConfig(dtype=options.dtype),
        )
        shape = source.shape
        folder = options.out / ".converted"
        try:
            self._on_main(source.converted, folder)
            self.watch.doing("loading")
            model = everywhere(build_model, shape, role, self.grid, device=self.world.device)
            load_weights(model, folder if source.is_hf else source.folder, grid=self.grid)
        finally:
            if self.world.is_main:
                shutil.rmtree(folder, ignore_errors=True)
        return MegatronEngine(model, self.grid)

    # ---- scores -----------------------------------------------------------------------------------------------

    def _score(self) -> dict[str, Scores]:
        """Votes are counted on all replicas, each for its share of the problems. The same on every rank."""
        return {benchmark.name: self._score_one(benchmark) for benchmark in self.work.benchmarks}

    def _score_one(self, benchmark: Benchmark) -> Scores:
        problems, samples = len(benchmark.problems), self.options.samples

        def without_texts() -> dict[tuple[int, int], Generation]:
            held = read_generations(self.options.out, benchmark.name)
            return {key: replace(generation, text="") for key, generation in held.items()}

        answers = self._gather(self._on_main(without_texts))[0]
        assert answers is not None
        self.watch.doing("counting votes")
        mine = own_votes(answers, problems, samples, self.judge, self.grid)
        classes = dict(ChainMap(*self._gather(mine)))
        return score_answers(answers, classes, problems, samples)

    def _report(self, scores: dict[str, Scores]) -> None:
        """Put the parts together, write the scores and print them."""
        report = {
            "model": str(self.work.source.folder),
            "settings": self.work.settings,
            "benchmarks": {name: result.as_dict() for name, result in scores.items()},
        }
        try:
            for benchmark in self.work.benchmarks:
                merge_parts(self.options.out, benchmark.name)
            write_whole(self.options.out / SCORES, [json.dumps(report, indent=2), "\n"])
        except OSError as error:
            raise DataError(f"--out {self.options.out}: cannot be written ({error}); run again with room") from error
        print(
            f"\n% right, with 95% intervals over problems\n{table(scores)}\nwritten to {self.options.out}", flush=True
        )
