"""FP8 of Transformer Engine on a GPU, against bfloat16: students, teachers, FP8 weights, resuming, two GPUs.

With FP8 emulated on a CPU (``precision.fp8.emulate``, recipe tensorwise) the first step's loss is 0.1 % and its
gradient's norm 5 % apart; later steps learn from other samples. Several times that is allowed here.
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
from gpu_runs import assert_close, need_gpus, run, train, write
from tiny_run import make_inputs

from fire_megatron.checkpoint.convert import megatron_to_hf
from fire_megatron.config.checks import check_recipe
from fire_megatron.config.load import load_recipe

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
SAME = 1e-2
"""Of two runs in the same number formats, whose kernels may sum in other orders."""
SETTINGS = {"device": "cuda", "layer_spec": "te", "dtype": "bfloat16", "loss": {"estimator": "full"}}
TWO_GPUS = {"tensor": {"tensor": 2}, "pipeline": {"pipeline": 2}, "context": {"context": 2}, "data": {}}
CASES = {recipe: {"fp8": {"recipe": recipe}} for recipe in RECIPES}
CASES |= {f"{recipe}-weights": {"fp8": {"recipe": recipe, "param_gather": True}} for recipe in RECIPES[1:3]}
CASES["ends-bf16"] = {"fp8": {"recipe": "tensorwise", "first_last_bf16": 1}}
CASES["teachers"] = {"teachers_fp8": {"recipe": "tensorwise"}}
CASES["teachers-weights"] = {"teachers_fp8": {"recipe": "tensorwise", "param_gather": True}}
CASES |= {f"{recipe}-{name}": {"fp8": {"recipe": recipe}, "parallel": layout}
          for recipe in RECIPES[:2] for name, layout in TWO_GPUS.items()}  # fmt: skip
"""Every run of these tests: what differs from the one in bfloat16."""

on_gpu = pytest.mark.gpu
needs_te = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("fp8"), head_dim=32, num_hidden_layers=4)


@pytest.fixture(scope="module")
def bf16(inputs):
    return run(inputs, "bf16", **settings())


def settings(case=None, **changes):
    """Arguments of ``gpu_runs.write`` for a case."""
    return {**SETTINGS, **(CASES[case] if case else {}), **changes}


def need(recipe):
    """Skip the test where this GPU, or Transformer Engine, has no such recipe."""
    from fire_megatron.models.fp8.settings import unsupported

    reason = unsupported(recipe)
    if reason:
        pytest.skip(reason)


def recipe_of(case):
    return next(iter(CASES[case].values()))["recipe"]


@pytest.mark.parametrize("case", CASES)
def test_the_recipes_of_these_tests_are_valid(inputs, case):
    """Also where there is no GPU."""
    layout = CASES[case].get("parallel")
    recipe = load_recipe(write(inputs, f"checked-{case}", **settings(case)))
    check_recipe(recipe, world_size=1 if layout is None else 2)


@on_gpu
@needs_te
@pytest.mark.parametrize("recipe", RECIPES)
def test_training_against_bfloat16(inputs, bf16, recipe):
    need(recipe)
    low = run(inputs, recipe, **settings(recipe))
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in low)
    assert_close(low[0], bf16[0], keys=("loss",), rel=0.1)
    # The very first micro-batch of delayed scaling has scales of 1, which small gradients get lost under.
    assert_close(low[0], bf16[0], keys=("grad_norm",), rel=0.5 if recipe == "delayed" else 0.25)
    assert low[0]["loss"] != bf16[0]["loss"], "nothing was rounded: the layers did not run in FP8"


@on_gpu
@needs_te
def test_layers_at_the_ends_in_bfloat16(inputs, bf16):
    need("tensorwise")
    low = run(inputs, "ends-bf16", **settings("ends-bf16"))
    assert low[0]["loss"] != bf16[0]["loss"]
    assert_close(low[0], bf16[0], keys=("loss",), rel=0.1)


@on_gpu
@needs_te
@pytest.mark.parametrize("case", ["teachers", "teachers-weights"])
def test_teachers_against_bfloat16(inputs, bf16, case):
    need("tensorwise")
    low = run(inputs, case, **settings(case))
    assert low[0]["loss"] != bf16[0]["loss"]
    assert_close(low[0], bf16[0], keys=("loss",), rel=0.1)


@on_gpu
@needs_te
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_fp8_weights(inputs, recipe):
    """The products are those of weights quantised at each use; sampling differs, as it reads the rounded weights.
    The run's last step goes back to Hugging Face in ``precision.dtype``."""
    need(recipe)
    case = f"{recipe}-weights"
    low = run(inputs, case, **settings(case, checkpoint__final=True))
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in low)
    step = max((inputs / case / "checkpoints").glob("step_*"))
    export = inputs / f"{case}-hf"
    megatron_to_hf(step, export)
    assert json.loads(Path(export / "config.json").read_text())["num_hidden_layers"] == 4
    assert list(export.glob("*.safetensors"))


@on_gpu
@needs_te
@pytest.mark.parametrize("case", ["delayed", "tensorwise", "tensorwise-weights"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(inputs, case):
    """With delayed scaling from the saved scales: those of a new run are 1."""
    need(recipe_of(case))
    through = run(inputs, f"{case}-through", **settings(case))
    stopped = write(inputs, f"{case}-stopped", **settings(case, checkpoint__final=True))
    train(stopped, "run.steps=2")
    resumed = train(stopped, "run.resume=must")
    assert [line["step"] for line in resumed] == [line["step"] for line in through]
    for line, expected in zip(resumed, through, strict=True):
        assert_close(line, expected, keys=("loss", "grad_norm"), rel=SAME)


@on_gpu
@needs_te
@pytest.mark.parametrize("layout", TWO_GPUS)
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_two_gpus_against_bfloat16_on_one(inputs, bf16, recipe, layout):
    """Replicas and tensor ranks share largest magnitudes; with delayed scaling each pass is a collective of both."""
    need_gpus(2)
    need(recipe)
    case = f"{recipe}-{layout}"
    low = run(inputs, case, ranks=2, **settings(case))
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in low)
    assert_close(low[0], bf16[0], keys=("loss",), rel=0.1)
