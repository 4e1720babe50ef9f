"""A teacher on a rank of its own that dies, hangs or fails: the whole run ends soon, says who it was, and can go on."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from processes import ROOT, TRAIN, command, environment
from tiny_run import read_metrics, tiny_recipe, train, write_recipe

from fire_megatron.checkpoint.steps import find_latest, saved_steps
from fire_megatron.cli.train import main
from fire_megatron.train.status import read_status

STEPS = 6
TIMEOUT = 12.0
"""``run.collective_timeout`` of these runs, seconds."""
PATIENCE = 90.0
PLUGIN = """
import os, time
from pathlib import Path
from fire_megatron.teachers.teacher import Teacher

rank, folder = os.environ["RANK"], Path(os.environ["FIRE_TEST_FOLDER"])
(folder / f"pid{rank}").write_text(str(os.getpid()))
calls, real = [0], Teacher.score

def score(self, *args, **kwargs):
    calls[0] += 1
    if calls[0] > 20:  # both teachers are asked a few times a step
        mode = os.environ["FIRE_TEST_MODE"]
        (folder / "ready").touch()
        if mode == "raise":
            raise TypeError("made up in a test")
        if mode == "hang":
            time.sleep(10_000)
        if mode in ("kill", "stop"):
            time.sleep(3)  # for the test to find it in the middle of its work
    return real(self, *args, **kwargs)

Teacher.score = score
"""


class Runs:
    """Starts the same run again and again: the student on rank 0, both teachers on rank 1."""

    def __init__(self, inputs, folder):
        """Nothing is started yet."""
        self.inputs, self.folder, self.process = inputs, folder, None
        (folder / "spoil_teacher.py").write_text(PLUGIN)

    def start(self, name, mode="", **changes):
        """Start it; ``mode`` is how the teacher fails."""
        own = {"student__ranks": "0-0", "teachers__math__ranks": "1-1", "teachers__code__ranks": "1-1"}
        if mode:
            own["run__plugins"] = ["spoil_teacher"]
        own |= {"run__steps": STEPS, "checkpoint__every": 1, "run__collective_timeout": TIMEOUT, **changes}
        recipe = write_recipe(self.folder / f"{name}.yaml", tiny_recipe(self.inputs, self.folder / name, **own))
        variables = environment(self.folder, FIRE_TEST_FOLDER=self.folder, FIRE_TEST_MODE=mode)
        self.log = self.folder / f"{name}-{mode}.log"
        with self.log.open("w") as log:
            words = command(*TRAIN, recipe, ranks=2)
            self.process = subprocess.Popen(words, stdout=log, stderr=log, cwd=ROOT, env=variables)

    def wait(self, condition):
        """Wait for something to come true; returns the seconds that it took."""
        started = time.monotonic()
        while not condition():
            assert time.monotonic() - started < PATIENCE, self.log.read_text()
            time.sleep(0.05)
        return time.monotonic() - started

    def pid(self, rank):
        """Process of a rank."""
        return int((self.folder / f"pid{rank}").read_text())

    def complaint(self):
        """The error that the run ended with, told once or by both ranks alike."""
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("error")]
        assert lines, self.log.read_text()
        return lines[0]

    def end(self):
        """Nothing is left running."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for path in self.folder.glob("pid*"):
                try:
                    os.kill(int(path.read_text()), signal.SIGKILL)
                except ProcessLookupError:
                    continue


@pytest.fixture
def runs(tiny, tmp_path):
    """See :class:`Runs`."""
    made = Runs(tiny, tmp_path)
    yield made
    made.end()


def alive(pid):
    """Whether a process is there and not a zombie."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


CASES = {
    "kill": (signal.SIGKILL, "rank 1 (teachers.code and teachers.math): scoring as"),
    "stop": (signal.SIGSTOP, "rank 1 (teachers.code and teachers.math): scoring as"),
    "hang": (None, "did not answer within run.collective_timeout (12 s), so the run ends: rank 1 (teachers.code"),
    "raise": (None, "teachers.code and teachers.math on rank 1 failed: TypeError: made up in a test"),
}


ONE_RANK = ["run.plugins=[]", *(f"{key}.ranks=null" for key in ("student", "teachers.math", "teachers.code"))]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """Metrics of the run that nothing happens to, in this process."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert train(tiny, run_dir, run__steps=STEPS) == 0
    return read_metrics(run_dir)


@pytest.mark.parametrize("mode", CASES)
def test_the_run_ends_names_the_teacher_and_goes_on_when_started_again(runs, whole, mode, capsys):
    number, expected = CASES[mode]
    runs.start("run", mode)
    runs.wait((runs.folder / "ready").exists)
    if number is not None:
        time.sleep(1.5)  # until its last sign of life says what it is at
        os.kill(runs.pid(1), number)
    student = runs.pid(0)
    seconds = runs.wait(lambda: not alive(student))
    assert seconds < TIMEOUT + 8  # what Python takes to leave, on a busy machine
    if mode == "stop":  # the launcher would give a stopped process half a minute
        os.kill(runs.pid(1), signal.SIGKILL)
    runs.wait(lambda: runs.process.poll() is not None)
    assert runs.process.returncode != 0
    assert expected in runs.complaint()
    status, log = read_status(runs.folder / "run"), runs.log.read_text()
    assert status.hopeless == (mode == "raise"), "another start would meet an error of the program again"
    assert status.state == "failed" and runs.complaint().endswith(status.error), "the verdict, not what follows from it"
    assert ('cli/supervision.py", line' in log) == (mode == "raise"), "a traceback where it tells something"
    records = list((runs.folder / "run" / "flight_recorder").glob("*/rank_0"))
    assert len(records) == (number is not None)
    assert all(f"The last collectives of each rank: {path.parent}/rank_*" in status.error for path in records)
    assert ("The last collectives" in status.error) == (number is not None)
    saved = saved_steps(runs.folder / "run" / "checkpoints")
    assert saved and saved[-1] < STEPS
    latest = find_latest(runs.folder / "run" / "checkpoints")

    if mode == "kill":
        runs.start("run")
        runs.wait(lambda: runs.process.poll() is not None)
        assert runs.process.returncode == 0, runs.log.read_text()
        said = runs.log.read_text()
    else:  # in this process, all roles on one rank
        assert main(["--recipe", str(runs.folder / "run.yaml"), *ONE_RANK]) == 0
        said = capsys.readouterr().out
    assert f"resumed from {latest}" in said
    resumed = read_metrics(runs.folder / "run")
    assert [line["step"] for line in resumed] == [line["step"] for line in whole] == list(range(1, STEPS + 1))
    for line, expected_line in zip(resumed, whole, strict=True):
        for key in ("loss", "grad_norm", "teacher/math/reverse_kl", "teacher/code/reverse_kl"):
            assert line.get(key, 0) == pytest.approx(expected_line.get(key, 0), rel=1e-5)


def test_a_signal_to_a_teacher_stops_the_run_in_good_order(runs):
    runs.start("run", "term", run__steps=400)
    runs.wait((runs.folder / "ready").exists)
    os.kill(runs.pid(1), signal.SIGTERM)
    runs.wait(lambda: runs.process.poll() is not None)
    assert runs.process.returncode == 0, runs.log.read_text()
    steps = [line["step"] for line in read_metrics(runs.folder / "run")]
    assert saved_steps(runs.folder / "run" / "checkpoints")[-1] == steps[-1] < 400
