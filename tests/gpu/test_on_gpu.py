"""The same recipe on a GPU as on the CPU: NCCL, Transformer Engine's layers where they are installed, bfloat16."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import make_inputs, read_metrics, tiny_recipe, write_recipe

REPOSITORY = Path(__file__).resolve().parents[2]
needs_te = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("gpu"), head_dim=32)


def run(inputs: Path, name: str, *, device: str, layer_spec: str = "local", dtype: str = "float32", **megatron):
    """Metrics of a run of the tiny recipe, greedy so that rounding does not choose other tokens."""
    values = tiny_recipe(
        inputs, inputs / name, run__device=device, rollout__temperature=0.0, optimizer__lr=1e-4, checkpoint__final=False
    )
    for role in (values["student"], *values["teachers"].values()):
        role |= {"layer_spec": layer_spec, "precision": {"dtype": dtype}, "megatron": dict(megatron)}
    recipe = write_recipe(inputs / f"{name}.yaml", values)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    done = subprocess.run(
        [*launch, "-m", "fire_megatron.train", "--recipe", str(recipe)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return read_metrics(inputs / name)


KEYS = ("loss", "grad_norm", "teacher/math/reverse_kl", "teacher/code/reverse_kl", "fire/keep_ratio")


@pytest.mark.parametrize("layer_spec", ["local", pytest.param("te", marks=needs_te)])
def test_float32_equals_the_cpu(inputs, layer_spec):
    cpu = run(inputs, f"cpu-{layer_spec}", device="cpu")
    gpu = run(inputs, f"gpu-{layer_spec}", device="cuda", layer_spec=layer_spec)
    for key in KEYS:
        assert gpu[0].get(key) == pytest.approx(cpu[0].get(key), rel=2e-3, abs=1e-4), key


@pytest.mark.parametrize("layer_spec", ["local", pytest.param("te", marks=needs_te)])
def test_bfloat16_trains(inputs, layer_spec):
    for line in run(inputs, f"bf16-{layer_spec}", device="cuda", layer_spec=layer_spec, dtype="bfloat16"):
        assert math.isfinite(line["loss"]) and line["grad_norm"] > 0
        assert line["memory/peak_mb"] > 0
