"""Where metrics go: console, ``metrics.jsonl``, ``samples.jsonl``, trackers."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from fire_megatron.config.errors import RecipeError
from fire_megatron.config.schema import MetricsConfig
from fire_megatron.metrics.console import Console, open_console
from fire_megatron.metrics.jsonl import METRICS_FILE, JsonlFile, keep_lines
from fire_megatron.metrics.trackers import SERVICES, TensorBoard, Tracker

SAMPLES_FILE = "samples.jsonl"
HELD_OUT_FILE = "held_out.jsonl"
RECIPE_FILE = "recipe.yaml"


def set_aside(run_dir: str | Path) -> list[Path]:
    """Rename the metrics and recipe of an earlier run that is not going to be continued, so that they are not lost.

    Returns:
        The new names; none when there was nothing.

    Raises:
        RecipeError: the folder cannot be written.
    """
    with writing_to(run_dir):
        return _set_aside(Path(run_dir))


@contextlib.contextmanager
def writing_to(folder: str | Path, key: str = "run.dir") -> Iterator[None]:
    """Turn what the file system refuses into a RecipeError about the recipe's key of the folder."""
    try:
        yield
    except OSError as error:
        raise RecipeError(f"{key}: {folder} cannot be written ({error}); choose another folder") from error


def _set_aside(folder: Path) -> list[Path]:
    renamed = []
    for name in (METRICS_FILE, SAMPLES_FILE, HELD_OUT_FILE, RECIPE_FILE):
        path = folder / name
        if path.exists() and path.stat().st_size:
            free = next(
                candidate
                for number in itertools.count(1)
                if not (candidate := path.with_name(f"{path.stem}.old{number}{path.suffix}")).exists()
            )
            renamed.append(path.rename(free))
    return renamed


def is_evaluation(line: Mapping[str, Any]) -> bool:
    """Whether a line of ``metrics.jsonl`` tells an evaluation alone."""
    return all(key == "step" or key.startswith("eval/") for key in line)


class MetricsLogger:
    """Writes each step's metrics to every place that the recipe asks for.

    One process of a run has it enabled; in the others every method does nothing. A resumed run continues the files
    as if it had never stopped: what they say about steps after the resumed one is dropped first.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: MetricsConfig,
        *,
        total_steps: int,
        start_step: int = 0,
        logged: int | None = None,
        evaluated: int | None = None,
        enabled: bool,
        name: str = "",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the files, and begin with the trackers.

        Args:
            run_dir: the run's folder; made when missing.
            config: what to write.
            total_steps: steps of the whole run.
            start_step: last step that counts as done; -1 for a fresh run, so that step 0 may be logged again.
            logged: last step whose metrics stay, ``start_step`` by default; later ones are going to be logged again.
            evaluated: last step whose evaluation stays, likewise.
            enabled: whether this process writes.
            name: of the run, for trackers.
            settings: its recipe, for trackers.

        Raises:
            RecipeError: the folder cannot be written, or a run that is not resumed cannot begin with a tracker.
        """
        self.config = config
        self._console: Console | None = None
        self._metrics: JsonlFile | None = None
        self._samples: JsonlFile | None = None
        self._held_out: Path | None = None
        self._trackers: dict[str, Tracker] = {}
        self._closed = not enabled
        self._enabled = enabled
        if not enabled:
            return
        folder = Path(run_dir)
        logged = start_step if logged is None else logged
        evaluated = start_step if evaluated is None else evaluated

        def stays(line: Mapping[str, Any]) -> bool:
            return line["step"] <= (evaluated if is_evaluation(line) else logged)

        try:
            with writing_to(folder):
                folder.mkdir(parents=True, exist_ok=True)
                if config.jsonl:
                    self._metrics = JsonlFile(folder / METRICS_FILE, stays)
                if config.samples:
                    self._samples = JsonlFile(folder / SAMPLES_FILE, lambda line: line["step"] <= start_step)
                keep_lines(folder / HELD_OUT_FILE, lambda line: line["step"] <= evaluated)
                self._held_out = folder / HELD_OUT_FILE
        except RecipeError:
            self.close()
            raise
        if config.console:
            self._console = open_console(total_steps=total_steps, start_step=max(start_step, 0))
        self._open_trackers(folder, name, settings or {}, logged=logged, resumed=start_step >= 0)

    def _open_trackers(
        self, folder: Path, name: str, settings: Mapping[str, Any], *, logged: int, resumed: bool
    ) -> None:
        if self.config.tensorboard:
            try:
                self._trackers["tensorboard"] = TensorBoard(folder, logged)
            except ImportError:
                self.message(
                    "metrics.tensorboard is on but the tensorboard package is not installed, so none is written; "
                    "pip install tensorboard"
                )
        for service in self.config.trackers:
            try:
                self._trackers[service] = SERVICES[service](folder, name, settings, resumed=resumed)
            except Exception as error:  # of a library that may raise anything
                told = f"metrics.trackers: {service} cannot begin ({type(error).__name__}: {error})"
                if not resumed:
                    self.close()
                    raise RecipeError(f"{told}; log in, name a server, or use WANDB_MODE=offline") from error
                self.message(f"WARNING: {told}; the run goes on without it")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write what a step has measured, or its evaluation: a record each.

        Args:
            step: steps done so far; 0 before the first.
            metrics: plain numbers by name; those that are not finite are null in the file.
        """
        if self._closed:
            return
        if self._metrics is not None:
            self._metrics.write({"step": step, **{key: metrics[key] for key in sorted(metrics)}})
        finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
        kind = "evaluation" if is_evaluation(metrics) else "step"
        for service, tracker in list(self._trackers.items()):
            try:
                tracker.log(step, finite, kind)
            except Exception as error:
                del self._trackers[service]
                told = f"{service} takes no more metrics ({type(error).__name__}: {error})"
                self.message(f"WARNING: {told}; the run goes on without it")
        if self._console is not None:
            self._guarded(self._console.step, step, metrics)

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows of a step to ``samples.jsonl``; with ``metrics.samples`` 0 none is even made."""
        if self._closed or self._samples is None:
            return
        for row in rows:
            self._samples.write({"step": step, **row})

    def held_out(self, step: int, prompt: str, answer: str) -> None:
        """Add to ``held_out.jsonl`` what the student answers to a held-out prompt after a step."""
        if self._held_out is not None:
            with contextlib.closing(JsonlFile(self._held_out, lambda line: True)) as file:
                file.write({"step": step, "prompt": prompt, "answer": answer})

    def message(self, text: str) -> None:
        """Show a line on the console, above the bar where there is one. Works after :meth:`close` too."""
        if not self._enabled:
            return
        if self._console is not None:
            self._guarded(self._console.message, text)
        elif self.config.console:
            self._guarded(lambda: print(text, flush=True))

    def progress(self, text: str) -> None:
        """Show what the step in progress is doing. Cheap enough to be called for every sampled token."""
        if self._console is not None:
            self._guarded(self._console.progress, text)

    def _guarded(self, show: Any, *arguments: Any) -> None:
        """A terminal that has gone away must not end a run."""
        try:
            show(*arguments)
        except OSError:
            self._console = None
        except ValueError:  # what Python raises for a stream that has been closed
            if not sys.stdout.closed:
                raise
            self._console = None

    def close(self) -> None:
        """Flush and close everything. May be called more than once."""
        self._closed = True
        for file in (self._metrics, self._samples):
            if file is not None:
                file.close()
        for service, tracker in self._trackers.items():
            try:
                tracker.close()
            except Exception as error:
                self.message(f"WARNING: {service} was not finished ({type(error).__name__}: {error})")
        if self._console is not None:
            self._guarded(self._console.close)
        self._console = self._metrics = self._samples = None
        self._trackers = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
