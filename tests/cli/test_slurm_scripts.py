"""The sbatch scripts without a Slurm: what they would do, what they refuse, and how a node hears of a signal."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("multi_teacher_miner", "single_teacher", "strong_to_weak")


@pytest.fixture
def folder(tmp_path):
    """A benchmark, and folders that look like Hugging Face checkpoints and a converted one."""
    (tmp_path / "bench.jsonl").write_text("{}\n")
    for name in ("student", "math", "code"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "code" / "fire_checkpoint.json").write_text("{}")
    return tmp_path


def script(name, folder, *arguments, **variables):
    """Run a script outside of Slurm."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    environment |= {"PYTHON": sys.executable, "BENCHMARKS": str(folder / "bench.jsonl"), "RUN_DIR": str(folder / "run")}
    environment |= {"STUDENT": str(folder / "student"), "CONVERTED": str(folder / "converted"), **variables}
    command = ["bash", str(ROOT / "slurm" / f"{name}.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder, check=False)


@pytest.mark.parametrize("name", SCRIPTS)
def test_dry_run(folder, name):
    teachers = {
        "multi_teacher_miner": f"math={folder}/math code={folder}/code",
        "single_teacher": f"math={folder}/math",
        "strong_to_weak": f"strong={folder}/code",
    }[name]
    done = script(name, folder, "--dry-run", TEACHERS=teachers, OVERRIDES="run.steps=7", EVALUATE_ARGS="--samples 2")
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("srun")]
    converted = [command[command.index("--hf") + 1] for command in commands if "hf-to-megatron" in command]
    roles = [f"{folder}/student"] + ([f"{folder}/math"] if "math=" in teachers else [])
    assert converted == roles, "what is converted already is taken as it is"
    train, evaluate, export = commands[-3:]
    assert "fire_megatron.train" in train and {"run.steps=7", f"run.dir={folder}/run"} <= set(train)
    own = str(folder / "student").replace("/", "--").removeprefix("--")
    assert f"student.checkpoint={folder}/converted/{own}" in train
    if "code" in teachers:
        code = "code" if name == "multi_teacher_miner" else "strong"
        assert f"teachers.{code}.checkpoint={folder}/code" in train
    last = f"{folder}/run/checkpoints/step_000007"
    assert evaluate[evaluate.index("--checkpoint") + 1] == last and evaluate[-2:] == ["--samples", "2"]
    assert export[-4:] == ["--checkpoint", last, "--out", f"{folder}/run/hf/step_000007"]
    assert not (folder / "run").exists() and not (folder / "converted").exists(), "nothing is done"


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"RECIPE": "recipes/absent.yaml"}, "RECIPE: recipes/absent.yaml does not exist"),
        ({"BENCHMARKS": "absent.jsonl"}, "BENCHMARKS: absent.jsonl does not exist"),
        ({"TEACHERS": "somewhere"}, "TEACHERS: 'somewhere' is not NAME=FOLDER"),
        ({"STUDENT": "absent"}, "student: absent is neither a Hugging Face folder nor a converted checkpoint"),
        ({"OVERRIDES": "run.stepps=3"}, "did you mean run.steps?"),
        ({"PYTHON": "/absent/python"}, "PYTHON: there is no /absent/python"),
    ],
)
def test_mistakes_are_told_before_anything_is_done(folder, variables, words):
    variables = {"TEACHERS": f"math={folder}/math", **variables}
    done = script("multi_teacher_miner", folder, "--dry-run", **variables)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert "srun" not in done.stdout


def test_outside_of_slurm_nothing_starts(folder):
    done = script("multi_teacher_miner", folder, TEACHERS=f"math={folder}/math")
    assert done.returncode == 2 and "start this with sbatch, or with --dry-run" in done.stderr


CHILD = "import signal, sys, time; {}; print('ready', flush=True); time.sleep(30)"


@pytest.mark.parametrize(
    "number, child, code",
    [
        # As torchrun does, which knows nothing of the signal and ends by itself.
        (signal.SIGUSR1, "signal.signal(signal.SIGALRM, lambda *_: sys.exit(0)); signal.alarm(1)", 75),
        # A trainer, which takes the signal for itself.
        (signal.SIGUSR1, "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))", 75),
        (signal.SIGTERM, "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))", 1),
        (None, "signal.signal(signal.SIGALRM, lambda *_: sys.exit(3)); signal.alarm(1)", 3),
        (None, "signal.signal(signal.SIGALRM, lambda *_: sys.exit(0)); signal.alarm(1)", 0),
    ],
)
def test_a_node_hears_a_signal(number, child, code):
    command = ["bash", str(ROOT / "slurm" / "node.sh"), sys.executable, "-c", CHILD.format(child)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    if number is not None:
        os.killpg(process.pid, number)  # every process of the step, as Slurm does
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code, out


HARNESS = """
source slurm/common.sh
set -euo pipefail
LOGS=$FOLDER CHECKPOINTS=$FOLDER/checkpoints RUN_DIR=$FOLDER
SLURM_JOB_ID=7 SLURM_JOB_NUM_NODES=2 PYTHON=python PROCESSES_PER_NODE=1 FIRST_NODE=here
mkdir -p "$CHECKPOINTS"
trap pass_on USR1
scontrol() { echo "scontrol $*"; }
scancel() { echo "scancel $*"; touch "$FOLDER/asked"; }
sleep() { command sleep 0.1; }
attempts() { cat "$FOLDER"/attempt_* 2>/dev/null | wc -l; }
srun() { echo "${FIRE_MEGATRON_RESTART:-0}" > "$FOLDER/attempt_$(attempts)"; BODY; }
stage train 3 -m fire_megatron.train
echo "done after $(attempts)"
"""
"""The script's own logic, with functions in the place of Slurm's commands."""

COURSES = {
    "succeeds": ("return 0", 0, 1, "done after 1"),
    "fails": ("return 9", 9, 4, "train failed 4 times in a row without a new checkpoint"),
    "fails with checkpoints": (
        '[[ $(attempts) -gt 6 ]] || { touch "$CHECKPOINTS/step_$(attempts)"; return 9; }', 0, 7, "done after 7"
    ),
    "is a mistake": ('echo "run.foo: wrong" > "$FIRE_MEGATRON_MISTAKE"; return 1', 2, 1, "train: run.foo: wrong"),
    "is a mistake at a signal": (
        'echo "run.foo: wrong" > "$FIRE_MEGATRON_MISTAKE"; return 75', 2, 1, "error: run.foo: wrong"
    ),
    # As a run that was stopped before and refuses to be restarted.
    "is a mistake after a stop": (
        'echo wrong > "$FIRE_MEGATRON_MISTAKE"; echo \'{"state": "stopped"}\' > "$FOLDER/status.json"; return 1', 2, 1,
        "train: wrong"
    ),
    "is killed after a stop": ("return 1", 1, 4, "train failed 4 times in a row without a new checkpoint"),
    "is asked to stop": ("return 75", 75, 1, "scontrol requeue 7"),
    "is preempted": ('echo \'"state": "stopped"\' > "$RUN_DIR/status.json"; return 1', 75, 1, "scontrol requeue 7"),
    # The signal comes to the script, which passes it on; the step ends in its own way.
    "nears its time limit": (
        'kill -USR1 $$; until [[ -e $FOLDER/asked ]]; do command sleep 0.05; done; return 138',
        75, 1, "scontrol requeue 7",
    ),
    "is done just before its time limit": (
        'kill -USR1 $$; until [[ -e $FOLDER/asked ]]; do command sleep 0.05; done', 0, 1, "done after 1"
    ),
}  # fmt: skip


@pytest.mark.parametrize("course", COURSES)
def test_a_stage_that(course, tmp_path):
    body, code, attempts, words = COURSES[course]
    environment = {**os.environ, "FOLDER": str(tmp_path)}
    if course.endswith("after a stop"):
        (tmp_path / "status.json").write_text('"state": "stopped"')
    command = ["bash", "-c", HARNESS.replace("BODY", body)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == code, done.stdout + done.stderr
    assert words in done.stdout + done.stderr
    counts = [path.read_text().strip() for path in sorted(tmp_path.glob("attempt_*"))]
    assert len(counts) == attempts
    if course == "fails":
        assert counts == ["0", "1", "2", "3"], "the run is told that it is restarted"
