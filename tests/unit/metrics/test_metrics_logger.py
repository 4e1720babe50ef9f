"""JSONL files that survive a resume, and a console that reads well with and without a terminal."""

import builtins
import io
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fire_megatron.config.errors import RecipeError
from fire_megatron.config.schema import MetricsConfig
from fire_megatron.metrics import console
from fire_megatron.metrics.console import evaluation_summary, summary
from fire_megatron.metrics.jsonl import JsonlFile, read_metrics
from fire_megatron.metrics.logger import MetricsLogger

QUIET = MetricsConfig(console=False)
STEP = {
    "loss": 0.123456,
    "grad_norm": 1.5,
    "fire/keep_ratio": 0.8,
    "fire/threshold/math": -1.0,
    "teacher/math/reverse_kl": 0.5,
    "teacher/code/reverse_kl": 0.25,
    "teacher/code/rows": 3.0,
    "rollout/tokens_per_second": 1234.5,
    "time/step": 2.04,
}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(folder: Path, first: int, last: int, *, resumed: int | None = None) -> None:
    """Log some steps, as a run does that starts afresh or continues after a step."""
    with MetricsLogger(
        folder, QUIET, total_steps=9, start_step=-1 if resumed is None else resumed, enabled=True
    ) as logger:
        for step in range(first, last + 1):
            logger.log(step, {"loss": 1 / (step + 1), "b": math.nan if step == 2 else step})


# ---- files --------------------------------------------------------------------------------------------------------


def test_one_object_a_step(tmp_path: Path) -> None:
    run(tmp_path / "new" / "run", 0, 2)
    assert lines(tmp_path / "new" / "run" / "metrics.jsonl") == [
        {"step": 0, "b": 0, "loss": 1.0},
        {"step": 1, "b": 1, "loss": 0.5},
        {"step": 2, "b": None, "loss": 1 / 3},
    ]
    assert list(lines(tmp_path / "new/run/metrics.jsonl")[0]) == ["step", "b", "loss"]


def test_each_step_is_on_disk_at_once(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path, QUIET, total_steps=3, enabled=True)
    logger.log(1, {"loss": math.inf})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None}]


def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path: Path) -> None:
    run(tmp_path / "a", 0, 6)
    run(tmp_path / "b", 0, 5)
    with (tmp_path / "b" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "lo')  # killed while writing
    run(tmp_path / "b", 4, 6, resumed=3)
    assert (tmp_path / "b" / "metrics.jsonl").read_bytes() == (tmp_path / "a" / "metrics.jsonl").read_bytes()
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["metrics.jsonl"]


def test_an_evaluation_that_was_not_saved_is_made_again(tmp_path: Path) -> None:
    """A step is logged at once and its evaluation after it; the checkpoint may be of the time between."""
    with MetricsLogger(tmp_path, QUIET, total_steps=3, start_step=-1, enabled=True) as logger:
        for step in range(3):
            logger.log(step, {"loss": 1.0} if step else {"eval/math/reverse_kl": 0.5})
            logger.log(step, {"eval/math/reverse_kl": 1.0 + step}) if step else None
    kept = {2: 5, 1: 4}  # by the last evaluation that counts
    for evaluated, count in kept.items():
        options = {"total_steps": 3, "start_step": 2, "enabled": True}
        MetricsLogger(tmp_path, QUIET, evaluated=evaluated, **options).close()
        assert len(lines(tmp_path / "metrics.jsonl")) == count
    assert read_metrics(tmp_path)[1:] == [
        {"step": 1, "loss": 1.0, "eval/math/reverse_kl": 2.0},
        {"step": 2, "loss": 1.0},
    ]


def test_a_last_line_without_its_end_is_dropped(tmp_path: Path) -> None:
    run(tmp_path, 0, 1)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    run(tmp_path, 1, 1, resumed=1)
    assert [line["step"] for line in lines(path)] == [0, 1]


def test_a_fresh_run_starts_the_file_again(tmp_path: Path) -> None:
    run(tmp_path, 0, 5)
    run(tmp_path, 0, 1)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [0, 1]


def test_lines_that_are_not_ours_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n[1]\n\n{"step": "2"}\n{"loss": 1}\n{"step": true}\n\xff\n{"step": 2}\n')
    JsonlFile(path, lambda line: line["step"] <= 5).close()
    assert lines(path) == [{"step": 1}, {"step": 2}]


def test_a_file_with_nothing_to_drop_is_not_rewritten(tmp_path: Path) -> None:
    run(tmp_path, 0, 3)
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    run(tmp_path, 4, 4, resumed=3)
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before


def test_a_rewrite_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, 0, 5)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RecipeError, match="run.dir: .* cannot be written .*No space left"):
        run(tmp_path, 3, 3, resumed=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match="run.dir: .*file/run cannot be written"):
        MetricsLogger(tmp_path / "file" / "run", QUIET, total_steps=1, enabled=True)


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = MetricsConfig(tensorboard=True, samples=3)
    with MetricsLogger(tmp_path / "run", config, total_steps=1, enabled=False) as logger:
        logger.log(1, STEP)
        logger.message("hello")
        logger.samples(1, [{"a": 1}])
    assert capsys.readouterr().out == "" and not (tmp_path / "run").exists()


def test_what_is_switched_off_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsLogger(tmp_path, MetricsConfig(console=False, jsonl=False), total_steps=1, enabled=True) as logger:
        logger.log(1, STEP)
        logger.message("hello")
        rows = iter([{"a": 1}])
        logger.samples(1, rows)
        assert list(rows) == [{"a": 1}], "rows that nobody wants are not even made"
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_samples(tmp_path: Path) -> None:
    config = MetricsConfig(console=False, samples=2)

    def rows() -> Iterator[dict[str, Any]]:
        yield {"prompt": "1 + 1", "score": math.nan}
        yield {"prompt": "ü", "kept": True}

    for _ in range(2):  # the second time resumes before step 1, which is written again
        with MetricsLogger(tmp_path, config, total_steps=1, start_step=0, enabled=True) as logger:
            logger.samples(1, rows())
    expected = [{"step": 1, "prompt": "1 + 1", "score": None}, {"step": 1, "prompt": "ü", "kept": True}]
    assert lines(tmp_path / "samples.jsonl") == expected


# ---- console ------------------------------------------------------------------------------------------------------


def test_summary() -> None:
    assert summary(STEP) == "loss 0.1235  grad_norm 1.5  keep 80%  kl code 0.2500 math 0.5000  1234 tok/s  2.0 s"
    assert summary({"learning_rate": 1.0}) == "" and "nan" in summary({"loss": math.nan})
    evaluated = {"eval/math/reverse_kl": 1.0, "eval/code/reverse_kl": 0.5, "eval/code/mean_length": 3.0}
    assert evaluation_summary(evaluated) == "held-out reverse KL  code 0.5000  math 1.0000"
    assert summary(evaluated) == "" and evaluation_summary(STEP) == ""


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsLogger(tmp_path, MetricsConfig(), total_steps=20, enabled=True) as logger:
        logger.log(0, {"eval/math/reverse_kl": 1.0})
        logger.log(3, {"loss": 0.5, "eval/math/reverse_kl": 0.9})
        logger.message("saved")
    logger.message("after the end")
    assert capsys.readouterr().out.splitlines() == [
        "step  0/20  held-out reverse KL  math 1.0000",
        "step  3/20  loss 0.5000",
        "step  3/20  held-out reverse KL  math 0.9000",
        "saved",
        "after the end",
    ]


class Terminal(io.StringIO):
    """A stream that says it is a terminal; its number is that of nothing that has a width."""

    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setattr(console, "_terminal_width", lambda: 120)
    with MetricsLogger(tmp_path, MetricsConfig(), total_steps=20, start_step=4, enabled=True) as logger:
        logger.log(5, {"loss": 0.5, "eval/math/reverse_kl": 0.9})
        logger.message("saved")
    shown = terminal.getvalue()
    assert "\r" in shown and "4/20" in shown and "5/20" in shown and "loss 0.5000" in shown
    assert "step 5/20  held-out reverse KL  math 0.9000\n" in shown and "saved\n" in shown


@pytest.mark.parametrize(("width", "tqdm"), [(0, "there"), (120, None)])
def test_lines_on_a_terminal_that_cannot_have_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, tqdm: str | None
) -> None:
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setattr(console, "_terminal_width", lambda: width)
    if tqdm is None:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    with MetricsLogger(tmp_path, MetricsConfig(), total_steps=2, enabled=True) as logger:
        logger.log(1, {"loss": 0.5})
    assert terminal.getvalue() == "step 1/2  loss 0.5000\n"


def test_a_console_that_goes_away_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    for stream in (Gone(), closed := io.StringIO()):
        monkeypatch.setattr(sys, "stdout", stream)
        with MetricsLogger(tmp_path, MetricsConfig(), total_steps=2, start_step=-1, enabled=True) as logger:
            closed.close() if stream is closed else None
            logger.log(1, {"loss": 0.5})
            logger.message("still here")
            logger.log(2, {"loss": 0.4})
        assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]


# ---- TensorBoard --------------------------------------------------------------------------------------------------


def test_a_missing_tensorboard_is_said_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with MetricsLogger(tmp_path, MetricsConfig(tensorboard=True), total_steps=1, enabled=True) as logger:
        logger.log(1, {"loss": 1.0})
    assert "tensorboard package is not installed" in capsys.readouterr().out
    assert len(lines(tmp_path / "metrics.jsonl")) == 1


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            calls.append((folder, purge_step))

        def add_scalar(self, key: str, value: float, step: int) -> None:
            calls.append((key, value, step))

        def close(self) -> None:
            calls.append(("closed",))

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    config = MetricsConfig(console=False, tensorboard=True)
    with MetricsLogger(tmp_path, config, total_steps=9, start_step=4, enabled=True) as logger:
        logger.log(5, {"loss": 1.0, "bad": math.nan})
    logger.close()
    assert calls == [(str(tmp_path / "tensorboard"), 5), ("loss", 1.0, 5), ("closed",)]


def test_lines_tell_what_a_long_step_is_doing(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    lines = console.open_console(total_steps=3, start_step=0)
    for second in range(70):
        now[0] = 100.0 + second
        lines.progress(f"step 1: rollout {second}")
    assert capsys.readouterr().out.splitlines() == ["step 1: rollout 30", "step 1: rollout 60"]
