"""A run that cannot go on says so and spoils nothing that is there."""

from __future__ import annotations

import itertools
import math
from unittest.mock import Mock

import pytest
import torch
from models import save_hf
from tiny_run import read_metrics, train

from fire_megatron.checkpoint.convert import hf_to_megatron
from fire_megatron.checkpoint.steps import saved_steps
from fire_megatron.fire.hooks import register_hook
from fire_megatron.train.checkpoints import Checkpoints
from fire_megatron.train.guard import UpdateGuard
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


def test_updates_in_a_row_are_counted_where_the_last_of_a_step_is_made(tiny, tmp_path, monkeypatch, capsys):
    judge, judged = UpdateGuard.judge, []

    def seen(self, loss, grad_norm):
        judged.append(loss)
        return judge(self, math.nan if len(judged) in (5, 6, 7) else loss, grad_norm)

    monkeypatch.setattr(UpdateGuard, "judge", seen)
    optimizer = {"mini_batches": 4, "guard": {"max_skipped": 1}}
    assert train(tiny, tmp_path / "run", run__steps=8, optimizer=optimizer, loss={"hooks": []}) == 2
    message = capsys.readouterr().err
    assert "step 2: 3 updates in a row were skipped (optimizer.guard.max_skipped=1), since loss, gradient" in message
    assert saved_steps(tmp_path / "run" / "checkpoints") == [2], "after the last update of the step all is sound"


@pytest.fixture
def broken(tiny, tmp_path):
    """The folder of a teacher all of whose log-probabilities are NaN."""
    source = tmp_path / "broken-hf"
    model = save_hf("qwen3", source, num_hidden_layers=1)
    model.lm_head.weight.data.fill_(math.nan)
    model.save_pretrained(source)
    hf_to_megatron(source, tmp_path / "broken")
    return tmp_path / "broken"


@register_hook("drop_all_of")
def drop_all_of(teachers=(), but_step=0):
    """Drops the rows of some teachers, or all of them."""
    steps = itertools.count(1)

    def hook(batch, selection, reducer):
        names = [i for i, name in enumerate(batch.teacher_names) if name in teachers or not teachers]
        rows_B = torch.isin(batch.teacher_B, torch.tensor(names))
        return selection if next(steps) == but_step else selection.drop(rows_B, "unwanted")

    return hook


GUARD = {"guard": {"max_skipped": 2}}
IN_VAIN = {
    "a teacher gives NaN": (
        ("math",), [], 3, "step 3: teachers.math: none of its rows trained in 3 steps in a row (optimizer.guard."
    ),
    "all teachers give NaN": (("math", "code"), [], 3, "step 3: teachers.code and teachers.math: none of its rows"),
    "a hook drops all": (
        (), [{"name": "drop_all_of"}], 3,
        "no row trained in 3 steps in a row (optimizer.guard.max_skipped=2) (dropped in the last: unwanted 4)",
    ),
    "a hook drops all but once": ((), [{"name": "drop_all_of", "but_step": 2}], 5, "step 5: no row trained in 3 steps"),
    "a hook drops a teacher": (
        (), [{"name": "drop_all_of", "teachers": ["code"]}], 4,
        "step 4: teachers.code: none of its 8 rows trained in 4 steps in a row"
    ),
}  # fmt: skip


@pytest.mark.parametrize("course", IN_VAIN)
def test_a_run_that_learns_nothing_ends(tiny, tmp_path, capsys, broken, course):
    teachers, hooks, step, says = IN_VAIN[course]
    overrides = [f"teachers.{name}.checkpoint={broken}" for name in teachers]
    files = [(tiny / f"{name}.jsonl").read_text().splitlines(keepends=True) for name in ("math", "code")]
    (tmp_path / "mixed.jsonl").write_text("".join(itertools.chain(*zip(*files, strict=True))))  # both in every step
    data = {"train": [{"path": str(tmp_path / "mixed.jsonl")}], "shuffle": False, "max_prompt_tokens": 16}
    changes = {"run__steps": 8, "run__plugins": ["json"], "optimizer": GUARD, "loss": {"hooks": hooks}, "data": data}
    changes["metrics__console"] = True
    assert train(tiny, tmp_path / "run", *overrides, **changes) == 2
    out, message = capsys.readouterr()
    assert says in message and "optimizer.lr" not in message, message
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, step + 1))
    assert saved_steps(tmp_path / "run" / "checkpoints") == [step], "the student is as sound as it was"
    assert read_status(tmp_path / "run").hopeless
    for name in ("math", "code"):
        told = f"WARNING: teachers.{name}: log-probabilities or entropies of"
        assert (told in out + message) == (name in teachers)


def test_a_short_run_that_learns_nothing_from_a_teacher_is_no_success(tiny, tmp_path, capsys, broken):
    teacher = f"teachers.code.checkpoint={broken}"
    assert train(tiny, tmp_path / "run", teacher, run__steps=2) == 2
    assert "teachers.code: none of its rows trained" in capsys.readouterr().err
    assert saved_steps(tmp_path / "run" / "checkpoints") == [2]


def test_a_run_that_ends_with_steps_in_vain_is_one(tiny, tmp_path):
    hooks = [{"name": "drop_all_of", "but_step": 1}]
    assert train(tiny, tmp_path / "run", run__steps=3, run__plugins=["json"], loss={"hooks": hooks}) == 0


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


@pytest.mark.parametrize("error, hopeless", [(TypeError("wrong"), True), (RuntimeError("CUDA error"), False)])
def test_whether_another_start_would_fail_too(tiny, tmp_path, monkeypatch, error, hopeless):
    monkeypatch.setattr(Student, "update", Mock(side_effect=error))
    monkeypatch.setenv("FIRE_MEGATRON_MISTAKE", str(tmp_path / "mistake"))
    with pytest.raises(type(error), match=str(error)):
        train(tiny, tmp_path / "run")
    status = read_status(tmp_path / "run")
    assert (status.state, status.hopeless) == ("failed", hopeless) and str(error) in status.error
    assert (tmp_path / "mistake").exists() == hopeless
    assert not list((tmp_path / "run").glob(".lock")), "the folder is free again"


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
