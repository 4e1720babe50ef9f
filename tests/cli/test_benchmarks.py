"""Every benchmark runs, at toy size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model with a tokenizer, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("tiny")
    subprocess.run([sys.executable, REPOSITORY / "tools" / "make_tiny.py", "--out", folder], check=True)
    return folder / "student"


def run(script, *arguments):
    command = [sys.executable, REPOSITORY / "benchmarks" / script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_rollout(tiny):
    out = run(
        "rollout.py", "--hf", tiny, "--prompts", REPOSITORY / "recipes" / "data" / "math.jsonl", "--rows", 3,
        "--new-tokens", 4, "--batch-size", 2, "--repeats", 1, "--threads", 1, "--baseline", REPOSITORY,
        "--kinds", "equal", "--stop", "a",
    )  # fmt: skip
    (result,) = json.loads(out.splitlines()[-1])
    assert {*result["sides"]} == {"ours", "baseline", "transformers"}
    for name, side in result["sides"].items():
        assert side["tokens"] == 12 and side["lengths"] == [4, 4, 4], name
        assert side["tokens_per_second"] > 0 and side["peak_mb"] > 0
    assert sum(line.split()[1] == "equal" for line in out.splitlines()[1:-1]) == 3
