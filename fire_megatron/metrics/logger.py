"""Where metrics are written: metrics.jsonl, the console, TensorBoard."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fire_megatron.config.schema import MetricsConfig

FILE = "metrics.jsonl"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def drop_later_steps(path: Path, step: int) -> None:
    """Keep only the lines of ``path`` up to ``step``, atomically: what a resumed run will write again goes.

    A last line that a killed process left unfinished goes too.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def console_line(metrics: Mapping[str, float]) -> str:
    """The few numbers that fit a line: loss, gradient norm, keep rate, reverse KL by teacher, speed."""
    parts = []
    for key, name, form in (
        ("loss", "loss", "{:+.4f}"),
        ("grad_norm", "grad", "{:.3f}"),
        ("fire/keep_ratio", "keep", "{:.0%}"),
    ):
        if key in metrics:
            parts.append(f"{name} {form.format(metrics[key])}")
    kls = [
        f"{key.split('/')[1]} {value:.3f}"
        for key, value in metrics.items()
        if key.startswith("teacher/") and key.endswith("/reverse_kl")
    ]
    if kls:
        parts.append("kl " + " ".join(kls))
    if "rollout/tokens_per_second" in metrics:
        parts.append(f"{metrics['rollout/tokens_per_second']:.0f} tok/s")
    if "time/step" in metrics:
        parts.append(f"{metrics['time/step']:.1f} s")
    held_out = [f"{k.split('/')[1]} {v:.3f}" for k, v in metrics.items() if k.startswith("eval/") and "kl" in k]
    if held_out:
        parts.append("held-out kl " + " ".join(held_out))
    return " | ".join(parts)


class MetricsLogger:
    """Writes a run's metrics. On ranks where ``enabled`` is false every method does nothing."""

    def __init__(
        self, run_dir: Path, config: MetricsConfig, *, total_steps: int, start_step: int = 0, enabled: bool = True
    ) -> None:
        """Args: start_step: step that the run continues from; later lines of metrics.jsonl are dropped. -1: none stay."""
        self.enabled, self.config = enabled, config
        self._bar: tqdm | None = None
        self._file: Any = None
        self._board: Any = None
        self._total = total_steps
        if not enabled:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        if config.jsonl:
            drop_later_steps(run_dir / FILE, start_step)
            self._file = (run_dir / FILE).open("a", encoding="utf-8")
        if config.console and sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=max(start_step, 0), unit="step", dynamic_ncols=True)
        if config.tensorboard:
            self._board = self._open_board(run_dir, start_step)

    def _open_board(self, run_dir: Path, start_step: int) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.message("metrics.tensorboard: the tensorboard package is not installed; pip install tensorboard")
            return None
        return SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one step's metrics; a number that is not finite becomes null in the file."""
        if not self.enabled:
            return
        if self._file is not None:
            row = {"step": step} | {key: _finite(value) for key, value in sorted(metrics.items())}
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        if self._board is not None:
            for key, value in metrics.items():
                self._board.add_scalar(key, value, step)
        if self._bar is not None:
            self._bar.n = step
            self._bar.set_postfix_str(console_line(metrics))
        if self.config.console:
            self.message(f"step {step}/{self._total} | {console_line(metrics)}")

    def message(self, text: str) -> None:
        """Print a line without breaking the progress bar."""
        if self.enabled:
            tqdm.write(text)
            sys.stdout.flush()

    def close(self) -> None:
        """Flush and close the files."""
        for part in (self._bar, self._file, self._board):
            if part is not None:
                part.close()
        self._bar = self._file = self._board = None
