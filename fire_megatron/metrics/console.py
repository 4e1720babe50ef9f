"""Progress for people: a bar on a terminal, one line a step anywhere else."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol


class Console(Protocol):
    """Shows progress and messages."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a finished step."""
        ...

    def message(self, text: str) -> None:
        """Show a line of text."""
        ...

    def progress(self, text: str) -> None:
        """Show what the step in progress is doing; called often."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was."""
        ...


def open_console(*, total_steps: int, start_step: int) -> Console:
    """A bar where standard output is a terminal and tqdm is there; lines otherwise."""
    if sys.stdout.isatty() and _terminal_width() > 0:
        try:
            return _Bar(total_steps, start_step)
        except ImportError:
            pass
    return _Lines(total_steps)


def _terminal_width() -> int:
    """Columns of the terminal; 0 on those that do not know, where a bar would be invisible."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):
        return 0


_COLUMNS = (
    ("loss", "loss {:.4f}"),
    ("grad_norm", "grad_norm {:.3g}"),
    ("fire/keep_ratio", "keep {:.0%}"),
)
_RATES = (("rollout/tokens_per_second", "{:.0f} tok/s"), ("time/step", "{:.1f} s"))


def _per_teacher(metrics: Mapping[str, float], section: str) -> Iterator[str]:
    for key in sorted(metrics):
        first, _, rest = key.partition("/")
        if first == section and rest.endswith("/reverse_kl"):
            yield f"{rest.removesuffix('/reverse_kl')} {metrics[key]:.4f}"


def summary(metrics: Mapping[str, float]) -> str:
    """What to know about a training step at a glance; empty when there is none of it."""
    parts = [text.format(metrics[key]) for key, text in _COLUMNS if key in metrics]
    teachers = list(_per_teacher(metrics, "teacher"))
    if teachers:
        parts.append(f"kl {' '.join(teachers)}")
    parts += [text.format(metrics[key]) for key, text in _RATES if key in metrics]
    return "  ".join(parts)


def evaluation_summary(metrics: Mapping[str, float]) -> str:
    """Reverse KL on held-out prompts and right answers to benchmarks; empty when the step was not evaluated."""
    teachers = list(_per_teacher(metrics, "eval"))
    parts = [f"held-out reverse KL  {'  '.join(teachers)}"] if teachers else []
    averages = {key.removeprefix("eval/"): value for key, value in metrics.items() if "/avg@" in key}
    parts += [f"{key.replace('/', ' ')} {value:.1%}" for key, value in sorted(averages.items())]
    return "  ".join(parts)


class _Lines:
    """One line a step, which reads well in a file or a Slurm log."""

    quiet_seconds = 30.0
    """Silence after which a line says what the step in progress is doing."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self._spoke = time.monotonic()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        width = len(str(self.total_steps))
        for text in (summary(metrics), evaluation_summary(metrics)):
            if text:
                self.message(f"step {step:>{width}}/{self.total_steps}  {text}")

    def message(self, text: str) -> None:
        print(text, flush=True)
        self._spoke = time.monotonic()

    def progress(self, text: str) -> None:
        if time.monotonic() - self._spoke >= self.quiet_seconds:
            self.message(text)

    def close(self) -> None:
        pass


class _Bar:
    """A tqdm bar; messages and evaluations scroll above it."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        from tqdm import tqdm

        self._drawn = 0.0
        layout = "{desc}{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
        self._bar: Any = tqdm(
            total=total_steps, initial=start_step, file=sys.stdout, dynamic_ncols=True, bar_format=layout, leave=True
        )

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        evaluated = evaluation_summary(metrics)
        if evaluated:
            self.message(f"step {step}/{self._bar.total}  {evaluated}")
        if trained := summary(metrics):
            self._bar.set_postfix_str(trained, refresh=False)
        self._bar.update(step - self._bar.n)
        self._bar.refresh()

    def message(self, text: str) -> None:
        self._bar.write(text, file=sys.stdout)

    def progress(self, text: str) -> None:
        now = time.monotonic()
        if now - self._drawn >= 0.2:
            self._drawn = now
            self._bar.set_description_str(f"{text}  ")

    def close(self) -> None:
        self._bar.close()
