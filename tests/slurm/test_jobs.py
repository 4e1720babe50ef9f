"""The sbatch script on a real Slurm of two nodes: a whole job, one that is asked to stop, one that loses a rank.

Submits jobs of minutes, so it runs only when asked to: ``FIRE_TEST_SLURM=1 pytest tests/slurm``, from a folder that all
nodes see.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "slurm" / "multi_teacher_miner.sh"
STEPS, SIGNAL_AT = 40, 12
PATIENCE = 900
MACHINE = ("time/", "memory/", "rollout/tokens_per_second", "router/")

pytestmark = pytest.mark.skipif(
    not os.environ.get("FIRE_TEST_SLURM") or shutil.which("sbatch") is None,
    reason="submits jobs: needs a Slurm of two nodes and FIRE_TEST_SLURM=1",
)


@pytest.fixture(scope="module")
def models():
    """Tiny random models as Hugging Face folders."""
    folder = ROOT / "demo" / "tiny" / "hf"
    if not (folder / "code" / "config.json").exists():
        subprocess.run([sys.executable, "tools/make_tiny.py", "--out", str(folder)], cwd=ROOT, check=True)
    return folder


class Job:
    """One submitted job on a run folder of its own."""

    def __init__(self, folder, models, **variables):
        """Submit it."""
        self.run = folder / "run"
        (folder / "minerva.jsonl").write_text(json.dumps({"problem": "What is 1+1?", "answer": "2"}) + "\n")
        environment = {
            **os.environ,
            "RECIPE": "recipes/smollm2_two_teachers.yaml",
            "STUDENT": str(models / "student"),
            "TEACHERS": f"math={models}/math code={models}/code",
            "BENCHMARKS": str(folder / "minerva.jsonl"),
            "EVALUATE_ARGS": "--samples 2 --max-new-tokens 16",
            "RUN_DIR": str(self.run),
            "CONVERTED": str(folder / "converted"),
            "OVERRIDES": f"run.steps={STEPS} checkpoint.every=5 run.collective_timeout=60",
            "PYTHON": sys.executable,
            **variables,
        }
        command = ["sbatch", "--parsable", f"--output={folder}/job.out", str(SCRIPT)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        self.id, self.out = done.stdout.strip(), folder / "job.out"

    def log(self):
        """Everything that it has printed."""
        logs = sorted(self.run.glob("logs/*/*.log"))
        return "\n".join(path.read_text() for path in [self.out, *logs] if path.exists())

    def state(self):
        """Of the job, in Slurm's words."""
        done = subprocess.run(["scontrol", "show", "job", "-o", self.id], capture_output=True, text=True, check=True)
        return dict(pair.split("=", 1) for pair in done.stdout.split() if "=" in pair)

    def steps(self):
        """Steps that the run has told of."""
        metrics = self.run / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def wait(self, condition):
        """Until something is true."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.3)

    def end(self):
        """Wait for its end; its state."""
        self.wait(lambda: self.state()["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"))
        return self.state()


@pytest.fixture(scope="module")
def straight(models, tmp_path_factory):
    """A job that nothing happens to."""
    job = Job(tmp_path_factory.mktemp("straight"), models)
    state = job.end()
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "0"), job.log()
    return job


def assert_same_metrics(job, straight):
    """Step by step, but for what a clock measures, and up to the last digits of float32 sums."""
    ours, theirs = read_metrics(job.run), read_metrics(straight.run)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        same = {key: value for key, value in b.items() if not key.startswith(MACHINE)}
        assert {key: a.get(key) for key in same} == pytest.approx(same, rel=1e-6), f"step {a['step']}"


def test_the_whole_job(straight):
    transformers = pytest.importorskip("transformers")
    exported = straight.run / "hf" / f"step_{STEPS:06d}"
    assert transformers.AutoModelForCausalLM.from_pretrained(exported).num_parameters() > 1000
    [scores] = json.loads((straight.run / "evaluation" / "final" / "scores.json").read_text())["benchmarks"].values()
    assert scores["problems"] == 1
    assert json.loads((straight.run / "status.json").read_text())["state"] == "done"
    assert len(list(straight.run.glob("logs/*/train-node*.log"))) == 2, "a log file a node"


def test_asked_to_stop_midway(straight, models, tmp_path):
    job = Job(tmp_path, models)
    job.wait(lambda: job.steps() >= SIGNAL_AT)
    subprocess.run(["scancel", "--signal=USR1", job.id], check=True)
    state = job.end()
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), job.log()
    assert "stopped by SIGUSR1 after step" in job.log()
    assert_same_metrics(job, straight)


def ranks_of(job):
    """Process id by rank of the trainers that run on this machine."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            values = dict(
                item.split(b"=", 1) for item in (folder / "environ").read_bytes().split(b"\0") if b"=" in item
            )
        except OSError:
            continue
        if b"fire_megatron.train" in command and str(job.run).encode() in command and b"RANK" in values:
            found[int(values[b"RANK"])] = int(folder.name)
    return found


def test_a_rank_is_killed_midway(straight, models, tmp_path):
    job = Job(tmp_path, models)
    job.wait(lambda: job.steps() >= SIGNAL_AT)
    ranks = ranks_of(job)
    if not ranks:
        pytest.skip("no rank of the job runs on this machine")
    os.kill(ranks[max(ranks)], signal.SIGKILL)
    state = job.end()
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "0"), job.log()
    assert "1 of 3 without a new checkpoint" in job.log()
    assert_same_metrics(job, straight)
