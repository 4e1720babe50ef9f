"""Models of Transformer Engine's layers take the very checkpoints that megatron-core's own layers take."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)
@pytest.mark.parametrize(
    ("family", "options", "experts"),
    [
        ("llama3-tied", ["--tensor=2"], None),
        ("qwen2", [], None),
        ("qwen3", ["--tensor=2"], None),
        ("qwen3-moe", [], "TEGroupedMLP"),
        ("qwen3-moe", ["--tensor=2", "--expert=2"], "TEGroupedMLP"),
        ("qwen3-moe", ["--expert=2", "--sequential"], "SequentialMLP"),
        ("qwen3-moe-mixed", ["--tensor=2"], "TEGroupedMLP"),
    ],
)
def test_same_tensors_as_the_checkpoint(family, options, experts, save_config, tmp_path):
    save_config(family)
    done = subprocess.run(
        [sys.executable, str(HERE / "te_names.py"), str(tmp_path), *options],
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert "TELayerNormColumnParallelLinear" in report["layers"], "these are not Transformer Engine's layers"
    assert "CoreAttention" in report["layers"]
    assert experts is None or {experts, "Router"} <= {*report["layers"]}
    assert report["found"] == report["wanted"]
