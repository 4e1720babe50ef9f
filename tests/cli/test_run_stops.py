"""A run that cannot go on says so and spoils nothing that is there."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_run import read_metrics, train

from fire_megatron.checkpoint.steps import saved_steps
from fire_megatron.train.checkpoints import Checkpoints
from fire_megatron.train.status import read_status
from fire_megatron.train.student import Student


def test_losses_that_are_not_finite_end_the_run(tiny, tmp_path, capsys):
    optimizer = {"lr": 1e30, "clip_grad": 0.0, "guard": {"max_skipped": 2}}
    assert train(tiny, tmp_path / "run", run__steps=8, optimizer=optimizer, checkpoint={"every": 2}) == 2
    message = capsys.readouterr().err
    assert "step 4: 3 updates in a row" in message and "optimizer.guard.max_skipped=2" in message
    assert "optimizer.lr (1e+30)" in message and "Traceback" not in message
    assert not list((tmp_path / "run").glob("checkpoints/step_*")), "ruined weights are not saved"
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["skipped/in_a_row"] for line in lines] == [0, 1, 2, 3]
    status = read_status(tmp_path / "run")
    assert (status.state, status.hopeless) == ("failed", True) and "3 updates in a row" in status.error


def test_a_run_that_ends_ruined_is_no_success(tiny, tmp_path):
    assert train(tiny, tmp_path / "run", run__steps=2, optimizer={"lr": 1e30, "clip_grad": 0.0}) == 2
    assert saved_steps(tmp_path / "run" / "checkpoints") == []


@pytest.mark.parametrize("distributed", [True, False])
def test_one_bad_gradient_is_left_out(tiny, tmp_path, monkeypatch, distributed):
    """The update is skipped, with the weights and the optimizer as they were, and the step is not saved."""
    accumulate, weights = Student.accumulate_gradients, []

    def poisoned(self, *args, **kwargs):
        weights.append([tensor.detach().clone() for tensor in self.memory()])
        report = accumulate(self, *args, **kwargs)
        if len(weights) == 2:
            next(iter(self.gradients()))[0] = math.nan
        return report

    monkeypatch.setattr(Student, "accumulate_gradients", poisoned)
    checkpoint, optimizer = {"every": 1, "keep": 9}, {"distributed": distributed}
    assert train(tiny, tmp_path / "run", checkpoint=checkpoint, optimizer=optimizer) == 0
    lines = read_metrics(tmp_path / "run")
    assert [line["skipped/nonfinite"] for line in lines] == [0, 1, 0, 0]
    assert [line["skipped/total"] for line in lines] == [0, 1, 1, 1]
    assert [line["grad_norm"] is None for line in lines] == [False, True, False, False]
    same = [all(map(torch.equal, a, b)) for a, b in zip(weights[1:], weights[2:], strict=False)]
    assert same == [True, False], "step 2 changes nothing, step 3 does"
    assert saved_steps(tmp_path / "run" / "checkpoints") == [1, 3, 4]
    assert read_status(tmp_path / "run").state == "done"


def test_metrics_of_a_run_that_saved_nothing_are_kept(tiny, tmp_path, capsys):
    changes = {"checkpoint__final": False, "run__steps": 1, "metrics__samples": 1}
    assert train(tiny, tmp_path / "run", **changes) == 0
    first = (tmp_path / "run" / "metrics.jsonl").read_text()
    for attempt in (1, 2):
        assert train(tiny, tmp_path / "run", **changes) == 0
        assert f"metrics.old{attempt}.jsonl" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.old1.jsonl").read_text() == first
    assert (tmp_path / "run" / "samples.old2.jsonl").exists()
    assert all(math.isfinite(line["loss"]) for line in read_metrics(tmp_path / "run"))


def test_a_step_that_an_earlier_version_saved_before_it_was_logged(tiny, tmp_path, monkeypatch):
    """It logged a step along with its evaluation, and kept the step's metrics in the checkpoint till then."""
    held_out = {"prompts": [{"path": str(tiny / "code.jsonl")}], "num_prompts": 2, "max_new_tokens": 3, "every": 2}
    held_out |= {"at_start": False, "at_end": False}
    save = Checkpoints.save

    def as_before(self, run, step, extra):
        save(self, run, step, {"first_eval": {}, "guard": extra["guard"], "untold": {"loss": 1.25}})

    for steps in (2, 3):
        with monkeypatch.context() as patch:
            if steps == 2:
                patch.setattr(Checkpoints, "save", as_before)
            assert train(tiny, tmp_path / "run", run__steps=steps, evaluation=held_out) == 0
    first, second, third = read_metrics(tmp_path / "run")
    assert second["loss"] == 1.25 and "eval/code/reverse_kl" in second and "time/step" not in second
    assert "eval/code/reverse_kl" not in {**first, **third} and third["loss"] != 1.25
