"""A run that cannot go on says so and spoils nothing that is there."""

from __future__ import annotations

import math

from tiny_run import make_inputs, read_metrics, tiny_recipe, write_recipe

from fire_megatron.cli.train import main


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, capsys):
    inputs = make_inputs(tmp_path, num_hidden_layers=1)
    values = tiny_recipe(inputs, tmp_path / "run", optimizer={"lr": 1e30, "clip_grad": 0.0}, checkpoint={"every": 2})
    recipe = write_recipe(tmp_path / "recipe.yaml", values)
    assert main(["--recipe", str(recipe)]) == 2
    message = capsys.readouterr().err
    assert "step 2" in message and "optimizer.lr (1e+30)" in message and "Traceback" not in message
    assert not list((tmp_path / "run").glob("checkpoints/step_*")), "ruined weights are not saved"
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2]


def test_metrics_of_a_run_that_saved_nothing_are_kept(tmp_path, capsys):
    inputs = make_inputs(tmp_path, num_hidden_layers=1)
    values = tiny_recipe(inputs, tmp_path / "run", checkpoint__final=False, run__steps=1, metrics__samples=1)
    recipe = write_recipe(tmp_path / "recipe.yaml", values)
    assert main(["--recipe", str(recipe)]) == 0
    first = (tmp_path / "run" / "metrics.jsonl").read_text()
    for attempt in (1, 2):
        assert main(["--recipe", str(recipe)]) == 0
        assert f"metrics.old{attempt}.jsonl" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.old1.jsonl").read_text() == first
    assert (tmp_path / "run" / "samples.old2.jsonl").exists()
    assert all(math.isfinite(line["loss"]) for line in read_metrics(tmp_path / "run"))
