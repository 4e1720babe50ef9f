"""What a run leaves in its folder."""

from __future__ import annotations

import json
import os

import pytest
from tiny_run import read_metrics, tiny_recipe, train, write_recipe

from fire_megatron.cli.train import main
from fire_megatron.config.errors import DataError
from fire_megatron.config.load import load_recipe, recipe_to_dict
from fire_megatron.config.roles import resolved
from fire_megatron.platform.folder_lock import alone_in


def test_files_of_a_run(tiny, tmp_path, capsys):
    run_dir = tmp_path / "run"
    held_out = {"prompts": [{"path": str(tiny / "math.jsonl")}], "num_prompts": 2, "max_new_tokens": 4}
    values = tiny_recipe(tiny, run_dir, metrics__samples=3, evaluation=held_out)
    recipe = write_recipe(tmp_path / "recipe.yaml", values)
    assert main(["--recipe", str(recipe), "run.steps=2"]) == 0

    saved = load_recipe(run_dir / "recipe.yaml")
    assert saved == resolved(load_recipe(recipe, ["run.steps=2"]), "cpu")
    assert saved.student.precision.dtype == "float32", "what null was on this machine"
    assert recipe_to_dict(saved)["optimizer"]["betas"] == [0.9, 0.95], "defaults are written out"
    assert [line["step"] for line in read_metrics(run_dir)] == [0, 1, 2]

    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [1, 1, 1, 2, 2, 2]
    assert [sum(not sample["kept"] for sample in samples if sample["step"] == step) for step in (1, 2)] == [1, 1]
    for sample in samples:
        assert sample["teacher"] == sample["label"] in ("math", "code") and sample["prompt"].startswith("w")
        by_token = sample["by_token"]
        assert 1 <= sample["tokens"] <= 6 and "".join(by_token["text"]) == sample["response"]
        assert all(len(column) == sample["tokens"] for column in by_token.values())
        assert (sample["mean_log_prob"] < sample["threshold"]) == (sample["reason"] == "below_threshold")
        assert ("weight" in by_token) == sample["kept"] == (sample["reason"] is None)
    metrics = {line["step"]: line for line in read_metrics(run_dir)}
    for sample in samples:
        step = metrics[sample["step"]]
        assert sample["threshold"] == step[f"fire/threshold/{sample['teacher']}"], "the one that the filter used"
        for weight in sample["by_token"].get("weight", []):
            assert step["fire/token_weight_min"] * 0.999 <= weight <= step["fire/token_weight_max"] * 1.001

    def asked():
        return [json.loads(line) for line in (run_dir / "held_out.jsonl").read_text().splitlines()]

    out = capsys.readouterr().out
    assert "WARNING" not in out and "The student's likeliest answer to a held-out prompt\n--- prompt\nw" in out
    assert "\n--- after step 0\n" in out and out.index("--- after step 2") > out.index("--- after step 0")
    assert [line["step"] for line in asked()] == [0, 2]
    assert len({line["prompt"] for line in asked()}) == 1 and all(line["answer"] for line in asked())
    other = "student.precision.dtype=bfloat16"
    assert main(["--recipe", str(recipe), "run.steps=3", other]) == 0
    out = capsys.readouterr().out
    changes = "run.steps 2 -> 3; student.precision.dtype float32 -> bfloat16"
    assert f"\nchanged since step 2: {changes}\n" in out
    resumed, told, *_ = [line for line in out.splitlines() if "step_000002" in line]
    assert resumed.startswith("resumed from") and told.startswith("WARNING: student.precision.dtype: ")
    assert "trained in float32 and the run goes on in bfloat16" in told and "dtype=float32" in told
    assert main(["--recipe", str(recipe), "run.steps=3", other]) == 0
    again = capsys.readouterr().out
    assert "resumed from" in again and "WARNING" not in again, "it is told once, where it changes"
    assert "changed since" not in again
    assert [line["step"] for line in read_metrics(run_dir)] == [0, 1, 2, 3]
    assert [line["step"] for line in asked()] == [0, 2, 3]
    assert load_recipe(run_dir / "recipe_from_000002.yaml").run.steps == 3


@pytest.mark.parametrize("key", ["run.dir", "checkpoint.dir", "checkpoint.dir in another run's"])
def test_one_run_at_a_time(tiny, tmp_path, capsys, key):
    key, another, _ = key.partition(" in")
    assert train(tiny, tmp_path / "first", run__steps=1) == 0
    folder = tmp_path / "first" / ("checkpoints" if key == "checkpoint.dir" else "")
    before = {path: path.read_bytes() for path in (tmp_path / "first").rglob("*") if path.is_file()}
    run_dir = tmp_path / ("second" if key == "checkpoint.dir" else "first")
    with alone_in(folder.parent if another else folder, DataError):
        assert train(tiny, run_dir, f"{key}={folder}", run__steps=2) == 2
        assert f"error: {key}: process {os.getpid()} on " in capsys.readouterr().err
        with alone_in(tmp_path / "third", DataError):  # looking at a recipe is free
            assert train(tiny, tmp_path / "third", "--check") == 0
    assert {path: path.read_bytes() for path in (tmp_path / "first").rglob("*") if path.is_file()} == before
    assert train(tiny, run_dir, f"{key}={folder}", run__steps=2) == 0


def test_the_loss_is_a_mean_whatever_the_mini_batches(tiny, tmp_path):
    """Before the first update moves the weights, the parts of a batch weigh by their tokens."""
    losses = []
    for parts in (1, 4):
        optimizer = {"mini_batches": parts, "lr": 1e-12, "clip_grad": 0.0}
        changes = {"run__steps": 1, "checkpoint__final": False, "optimizer": optimizer, "loss": {"hooks": []}}
        assert train(tiny, tmp_path / f"run{parts}", **changes) == 0
        losses.append(read_metrics(tmp_path / f"run{parts}")[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] != 0
