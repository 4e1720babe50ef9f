"""Whole runs with the exact and the top-k divergence: what is learned, and what is reported."""

from __future__ import annotations

import json

import pytest
from models import save_megatron
from tiny_run import make_inputs, read_metrics, train


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The tiny models, a teacher whose vocabulary has unused entries at the end, and rows with several teachers."""
    folder = make_inputs(tmp_path_factory.mktemp("estimators"))
    save_megatron("llama", folder / "wide", seed=2, num_hidden_layers=2, hidden_size=32, vocab_size=330)
    rows = [{"problem": f"w{i} w{i + 7}", "label": {"math": 1, "code": 1 + i % 2}} for i in range(20, 26)]
    (folder / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(inputs, run_dir, **changes):
    common = {"run__steps": 12, "optimizer__lr": 3e-3, "checkpoint__final": False, "loss__hooks": []}
    assert train(inputs, run_dir, **common | changes) == 0
    return read_metrics(run_dir)


@pytest.mark.parametrize(
    "loss",
    [
        {"estimator": "full"},
        {"estimator": "full", "divergence": "jensen_shannon", "chunk_tokens": 3},
        {"estimator": "full", "divergence": "skewed_forward_kl", "teacher_temperature": 1.2},
        {"estimator": "topk", "top_k": 16, "divergence": "forward_kl"},
    ],
    ids=lambda loss: " ".join(map(str, loss.values())),
)
def test_the_divergence_falls(inputs, tmp_path, loss):
    changes = {f"loss__{key}": value for key, value in loss.items()}
    steps = run(inputs, tmp_path / "run", teachers__code__checkpoint=str(inputs / "wide"), **changes)
    assert all(step["loss"] == pytest.approx(step["loss/divergence"]) for step in steps)
    first, last = (sum(step["loss/divergence"] for step in part) for part in (steps[:3], steps[-3:]))
    assert last < 0.8 * first, (first, last)
    for name, hidden in {"math": 64, "code": 32}.items():
        width = hidden if loss["estimator"] == "full" else 2 * 16 + 1
        seen = [step for step in steps if f"teacher/{name}/divergence" in step]
        assert seen and all(step[f"teacher/{name}/bytes_per_token"] == 4 * width + 8 for step in seen)
        assert all(step[f"teacher/{name}/bytes_per_token_of_logits"] == 4 * 301 for step in seen)


@pytest.mark.parametrize("mixture", ["distributions", "log_probs"])
@pytest.mark.parametrize("estimator", ["full", "sampled"])
def test_rows_with_several_teachers(inputs, tmp_path, estimator, mixture):
    train = [{"path": str(inputs / name)} for name in ("math.jsonl", "mixed.jsonl")]
    held_out = {"prompts": [{"path": str(inputs / "mixed.jsonl")}], "max_new_tokens": 4}
    steps = run(
        inputs,
        tmp_path / "run",
        data__train=train,
        evaluation=held_out,
        loss__estimator=estimator,
        loss__mixture=mixture,
    )
    seen = [step for step in steps if step.get("teacher/code+math/rows")]
    assert seen and all("teacher/code+math/reverse_kl" in step for step in seen)
    assert all(("teacher/code+math/divergence" in step) == (estimator == "full") for step in seen)
    before, after = (step["eval/code+math/reverse_kl"] for step in (steps[0], steps[-1]))
    # Twelve steps of a few samples are too few for the policy gradient to be sure of it.
    assert after < before or estimator == "sampled"


def test_several_updates_a_step(inputs, tmp_path):
    steps = run(inputs, tmp_path / "run", loss__estimator="full", optimizer__mini_batches=2)
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_bfloat16(inputs, tmp_path):
    half = {"dtype": "bfloat16"}
    steps = run(
        inputs,
        tmp_path / "run",
        loss__estimator="full",
        student__precision=half,
        teachers__math__precision=half,
        teachers__code__precision=half,
    )
    first, last = (sum(step["loss/divergence"] for step in part) for part in (steps[:3], steps[-3:]))
    assert last < 0.8 * first, (first, last)
    assert {step["teacher/math/bytes_per_token"] for step in steps if "teacher/math/divergence" in step} == {2 * 64 + 8}


def test_one_temperature_leaves_importance_correction_nothing_to_do(inputs, tmp_path, capsys):
    """Where engine and loss differ, it takes the ratio of two distributions for that of two engines, which is told.
    Held-out prompts are sampled and scored at temperature 1 whatever the loss."""
    found = {}
    held_out = {"prompts": [{"path": str(inputs / "math.jsonl")}], "max_new_tokens": 4, "at_end": False}
    for temperature in (1.0, 0.5):
        changes = {"rollout__temperature": 0.5, "loss__temperature": temperature, "evaluation": held_out}
        first, step = run(inputs, tmp_path / f"run{temperature}", **changes | {"run__steps": 1})
        said = "rollout.temperature is 0.5 and loss.temperature 1" in capsys.readouterr().out
        found[temperature] = first["eval/math/reverse_kl"], step["rollout/importance_mean"], said
    assert found[1.0][0] == found[0.5][0]
    assert abs(found[1.0][1] - 1) > 0.02 and found[1.0][2]
    assert found[0.5][1] == pytest.approx(1, abs=1e-5) and not found[0.5][2]
