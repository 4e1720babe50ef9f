"""A run is not continued with another student than it was begun with: its weights would not be used."""

from __future__ import annotations

import shutil

import pytest
import torch
from models import save_megatron
from tiny_run import read_metrics, train

from fire_megatron.checkpoint.steps import saved_steps


@pytest.fixture
def run_dir(tiny, tmp_path):
    """Of a run of one step, from a student in ``tmp_path/student``."""
    shutil.copytree(tiny / "student", tmp_path / "student")
    assert train(tiny, tmp_path / "run", f"student.checkpoint={tmp_path / 'student'}", run__steps=1) == 0
    return tmp_path / "run"


@pytest.mark.parametrize("changes", [{"seed": 9}, {"num_hidden_layers": 2}, {"rope_theta": 5e5}])
def test_another_student_is_refused(tiny, run_dir, tmp_path, capsys, changes):
    save_megatron("qwen3", tmp_path / "other", **{"num_hidden_layers": 1, **changes})
    assert train(tiny, run_dir, f"student.checkpoint={tmp_path / 'other'}", run__steps=2) == 2
    message = capsys.readouterr().err
    assert f"student.checkpoint: {run_dir}/checkpoints/step_000001 was trained from {tmp_path}/student, and" in message
    assert f"{tmp_path}/other holds another model: it would not be used; restore it, or train it in a new" in message
    assert saved_steps(run_dir / "checkpoints") == [1] and len(read_metrics(run_dir)) == 1


def test_another_student_in_the_same_folder_is_refused(tiny, run_dir, tmp_path, capsys):
    shutil.rmtree(tmp_path / "student")
    save_megatron("qwen3", tmp_path / "student", num_hidden_layers=1, seed=9)
    assert train(tiny, run_dir, f"student.checkpoint={tmp_path / 'student'}", run__steps=2) == 2
    assert f"was trained from {tmp_path}/student, which holds another model by now" in capsys.readouterr().err


def test_the_same_student_elsewhere_is_taken(tiny, run_dir, capsys):
    assert train(tiny, run_dir, run__steps=2) == 0
    assert "changed since step 1: run.steps 1 -> 2\n" in capsys.readouterr().out


def test_a_step_of_an_earlier_version_goes_on(tiny, run_dir, capsys):
    """It recorded nothing; from here on it is recorded."""
    path = run_dir / "checkpoints" / "step_000001" / "weights" / "common.pt"
    common = torch.load(path)
    for key in ("trained_with", "begun", "fruitless"):
        del common["extra"][key]
    torch.save(common, path)
    path.with_name("checksums.json").unlink()
    for steps in (2, 3):
        assert train(tiny, run_dir, run__steps=steps, loss={"hooks": []}) == 0
        assert ("changed since step 2: run.steps 2 -> 3\n" in capsys.readouterr().out) == (steps == 3)
