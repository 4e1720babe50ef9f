"""Bad input on two ranks: every rank leaves with exit code 2 and none hangs, also when only one sees the problem."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from tiny_run import make_inputs, tiny_recipe, write_recipe

from fire_megatron.checkpoint.steps import saved_steps

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60
CASES = (
    ("recipe", 1, "absent.yaml: no such recipe file"),
    ("recipe", 0, "absent.yaml: no such recipe file"),
    ("plugin", 1, "2 problems in the recipe:\n  - loss.hooks.0.name: no hook is named 'filter'"),
    ("prompts", 1, "rank-local: prompts"),
    ("files", 1, "rank-local: files"),
    ("chunk", 1, "rank-local: chunk"),
    ("run folder", 0, "rank-local: run folder"),
    ("disk", 1, "cannot be written"),
)
"""What is spoilt, on which rank, and what the run says."""


def torchrun(*command):
    """Start something on two ranks; returns exit code and output. A hang fails the test."""
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
    )
    try:
        output = process.communicate(timeout=PATIENCE)[0]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # which ends its ranks as well
        process.communicate()
        raise
    return process.returncode, output


def free_ports(count):
    """Ports that nobody listens on, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Models and prompts."""
    return make_inputs(tmp_path_factory.mktemp("bad-ranks"), num_hidden_layers=1)


def test_two_ranks_with_a_bad_recipe(inputs, tmp_path):
    values = tiny_recipe(inputs, tmp_path / "run", student__parallel={"tensor": 4})
    code, output = torchrun("-m", "fire_megatron.train", "--recipe", write_recipe(tmp_path / "recipe.yaml", values))
    assert code != 0
    assert output.count("student.parallel.tensor: 4 does not divide the model's 2 key/value heads") == 1, output
    assert "exitcode  : 2" in output


def test_one_rank_sees_the_problem(inputs, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_recipe(inputs, tmp_path / "run", run__steps=1))
    cases = [
        {"spoilt": spoilt, "rank": rank, "port": port, "recipe": str(recipe), "run_dir": str(tmp_path / f"run{i}")}
        for i, ((spoilt, rank, _), port) in enumerate(zip(CASES, free_ports(len(CASES)), strict=True))
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    code, output = torchrun(Path(__file__).with_name("rank_driver.py"), tmp_path / "cases.json")
    assert code != 0
    assert "Traceback" not in output.split("torch/distributed/elastic")[0], output
    results = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for case, main_rank, other in zip(CASES, *results, strict=True):
        assert main_rank["code"] == other["code"] == 2, case
        assert main_rank["errors"].startswith("error: ") and case[2] in main_rank["errors"], case
        assert other["errors"] == "", "one rank speaks for all"
        assert max(main_rank["seconds"], other["seconds"]) < 20, case
    assert saved_steps(Path(cases[-1]["run_dir"]) / "checkpoints") == []
