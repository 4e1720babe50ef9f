"""SIGTERM and Ctrl-C: the run saves, leaves with exit code 0, and continues when it is started again."""

from __future__ import annotations

import signal
import subprocess
import time

import pytest
from processes import ROOT, TRAIN, command, environment
from tiny_run import read_metrics, tiny_recipe, write_recipe

from fire_megatron.checkpoint.steps import saved_steps
from fire_megatron.cli.train import main

STEPS = 400
"""More than are done before the signal comes."""
PATIENCE = 60


@pytest.fixture
def start(tiny, tmp_path):
    """Starts the training command on a new run folder, or on the same one again; ends it whatever happens."""
    started = []

    def begin(*, ranks=1):
        values = tiny_recipe(tiny, tmp_path / "run", run__steps=STEPS, metrics__console=True)
        recipe = write_recipe(tmp_path / "recipe.yaml", values)
        log, words = (tmp_path / "log").open("w"), command(*TRAIN, recipe, ranks=ranks)
        started.append(subprocess.Popen(words, stdout=log, stderr=log, cwd=ROOT, env=environment()))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def wait_for_steps(process, run_dir, count):
    """Wait until the run has done some steps."""
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + PATIENCE
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < count:
        assert process.poll() is None, (run_dir.parent / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def check_saved(run_dir):
    """The step that was saved: the last one that metrics.jsonl tells of."""
    steps = [line["step"] for line in read_metrics(run_dir)]
    saved = saved_steps(run_dir / "checkpoints")
    assert saved == [steps[-1]] and 2 <= saved[0] < STEPS
    return saved[0]


def check_continued(run_dir, saved, capsys):
    """A second start, in this process and on one rank, goes on where the first one stopped, to the end."""
    assert main(["--recipe", str(run_dir.parent / "recipe.yaml"), f"run.steps={saved + 2}"]) == 0
    checkpoint = run_dir / "checkpoints" / f"step_{saved:06d}"
    assert f"resumed from {checkpoint} after step {saved}" in capsys.readouterr().out
    assert [line["step"] for line in read_metrics(run_dir)] == list(range(1, saved + 3))
    assert saved_steps(run_dir / "checkpoints") == [saved, saved + 2]


def run_and_stop(start, run_dir, number, **options):
    """Start a run, signal it, and wait; returns exit code and seconds from signal to exit."""
    process = start(**options)
    wait_for_steps(process, run_dir, 2)
    sent = time.monotonic()
    process.send_signal(number)
    return process.wait(PATIENCE), time.monotonic() - sent


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_signal_saves_and_the_run_continues(start, tmp_path, number, capsys):
    run_dir = tmp_path / "run"
    code, seconds = run_and_stop(start, run_dir, number)
    log = (tmp_path / "log").read_text()
    assert code == 0 and seconds < 15, log
    saved = check_saved(run_dir)
    assert f"stopped by {number.name} after step {saved}; run again to continue" in log
    assert "Traceback" not in log
    check_continued(run_dir, saved, capsys)


def test_sigterm_to_torchrun(start, tmp_path, capsys):
    run_dir = tmp_path / "run"
    code, seconds = run_and_stop(start, run_dir, signal.SIGTERM, ranks=2)
    assert code != 0 and seconds < 25, "torchrun itself reports that it was ended"
    saved = check_saved(run_dir)
    assert f"stopped by SIGTERM after step {saved}" in (tmp_path / "log").read_text()
    check_continued(run_dir, saved, capsys)  # in another layout
