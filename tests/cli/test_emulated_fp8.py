"""Short runs in emulated FP8: near the run without, continued as if never stopped, refused where it makes no sense."""

from __future__ import annotations

import pytest
import tiny_run
from tiny_run import make_inputs, read_metrics

CURVE = 0.04
"""Mean distance of a step's loss from the run's without FP8, relative to the mean loss; docs/fp8.md states it."""
OPTIMIZER = {"lr": 5e-4, "eps": 1e-4, "mini_batches": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("fp8"))


def train(inputs, folder, fp8, *overrides, teachers=True):
    """The metrics of a run of 4 steps with two updates each, all roles in FP8 but teachers with recipe delayed."""
    changes = {"student__precision": {"fp8": fp8}}
    if fp8 and teachers:
        recipe = "tensorwise" if fp8["recipe"] == "delayed" else fp8["recipe"]
        changes |= {f"teachers__{name}__precision": {"fp8": {**fp8, "recipe": recipe}} for name in ("math", "code")}
    changes |= {"run__steps": 4, "run__threads": 1, "optimizer": OPTIMIZER, "checkpoint__final": False}
    changes |= {"rollout__prompts_per_step": 12, "loss": {"estimator": "full"}}
    assert tiny_run.train(inputs, folder, *overrides, **changes) == 0
    return read_metrics(folder)


def emulated(recipe):
    return {"recipe": recipe, "emulate": True}


@pytest.fixture(scope="module")
def plain(inputs):
    return train(inputs, inputs / "plain", None)


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise", "mxfp8"])
def test_a_run_stays_near_the_one_without(inputs, plain, tmp_path, recipe):
    ours = train(inputs, tmp_path / recipe, emulated(recipe))
    scale = sum(abs(line["loss"]) for line in plain) / len(plain)
    apart = [abs(a["loss"] - b["loss"]) / scale for a, b in zip(ours, plain, strict=True)]
    assert 0 < sum(apart) / len(apart) <= CURVE, apart
    for a, b in zip(ours, plain, strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.5)


def test_a_continued_run_has_the_scales_that_it_had(inputs, tmp_path):
    straight = train(inputs, tmp_path / "straight", emulated("delayed"))
    train(inputs, tmp_path / "stopped", emulated("delayed"), "run.steps=2", "checkpoint.final=true")
    resumed = train(inputs, tmp_path / "stopped", emulated("delayed"))
    assert [line["step"] for line in resumed] == [1, 2, 3, 4]
    for ours, theirs in zip(resumed, straight, strict=True):
        assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])


@pytest.mark.parametrize(
    ("fp8", "overrides", "message"),
    [
        (emulated("tensorwise"), ["run.device=cuda"], "student.precision.fp8.emulate"),
        (emulated("tensorwise"), ["student.layer_spec=te"], "student.layer_spec is te"),
        (emulated("tensorwise") | {"first_last_bf16": 1}, [], "1 layers at each end of the model's 2"),
        (None, ["teachers.math.precision.fp8={recipe: delayed, emulate: true}"], "a teacher has none; take tensorwise"),
    ],
)
def test_refusals(inputs, tmp_path, capsys, fp8, overrides, message):
    assert tiny_run.train(inputs, tmp_path / "run", *overrides, student__precision={"fp8": fp8}) != 0
    assert message in capsys.readouterr().err
