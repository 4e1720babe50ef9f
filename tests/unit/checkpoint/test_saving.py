"""Saving in the background: the state at the time of the save, whatever the training does meanwhile; and its errors."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny_run import make_inputs, tiny_recipe

from fire_megatron.checkpoint import saving
from fire_megatron.checkpoint.convert import megatron_to_hf
from fire_megatron.checkpoint.resuming import load_training_state
from fire_megatron.checkpoint.steps import saved_steps, step_folder
from fire_megatron.checkpoint.torch_dist import ShardWriter
from fire_megatron.config.errors import CheckpointError
from fire_megatron.config.load import recipe_from_dict
from fire_megatron.platform import launch
from fire_megatron.train.lifecycle import Trainer
from fire_megatron.train.loop import train_step


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A student with an optimizer that has taken a step, in float32 from a checkpoint in bfloat16."""
    folder = make_inputs(tmp_path_factory.mktemp("saving"), num_hidden_layers=1, dtype=torch.bfloat16)
    trainer = Trainer(recipe_from_dict(tiny_recipe(folder, folder / "run")), launch.start("cpu", threads=1))
    train_step(trainer.run, 0)
    yield trainer.run
    launch.stop()


@pytest.fixture
def saver(run, tmp_path):
    """Saves to ``tmp_path`` in the background."""
    group = dist.new_group([0], backend="gloo")
    return saving.Saver(
        tmp_path, source=Path(run.recipe.student.checkpoint), keep=2, grid=run.grid,
        background=group,
    )  # fmt: skip


def save(saver, run, step, **extra):
    """One step."""
    saver.save(step, run.student.model, run.student.optimizer, rng={}, extra=extra)


def test_what_changes_meanwhile_is_not_in_it(run, saver, tmp_path, monkeypatch):
    write, gate = ShardWriter.write, threading.Event()

    def held_up(self, *args, **kwargs):
        assert gate.wait(60)
        write(self, *args, **kwargs)

    monkeypatch.setattr(ShardWriter, "write", held_up)
    before = [tensor.detach().clone() for tensor in run.student.memory()]
    save(saver, run, 1, mark="first")
    assert saved_steps(tmp_path) == [] and saver.finished() == []
    with torch.no_grad():
        for tensor in run.student.memory():
            tensor.add_(1.0)
    gate.set()
    saver.wait()
    [(step, seconds)] = saver.finished()
    assert step == 1 and seconds > 0 and saved_steps(tmp_path) == [1]
    state = load_training_state(step_folder(tmp_path, 1), run.student.model, run.student.optimizer, grid=run.grid)
    assert (state.step, state.extra) == (1, {"mark": "first"})
    assert all(map(torch.equal, before, run.student.memory()))


def test_a_step_is_exported_in_the_dtype_of_its_source(run, saver, tmp_path):
    save(saver, run, 1)
    saver.wait()
    back = [megatron_to_hf(step_folder(tmp_path, 1), tmp_path / str(told), dtype=told) for told in (None, "float32")]
    narrow, wide = (load_file(folder / "model.safetensors") for folder in back)
    assert {tensor.dtype for tensor in narrow.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in wide.values()} == {torch.float32}
    assert all(torch.equal(tensor.bfloat16(), narrow[name]) for name, tensor in wide.items())
    assert not all(torch.equal(tensor, narrow[name].float()) for name, tensor in wide.items())


def test_one_after_the_other(run, saver, tmp_path):
    for step in (1, 2, 3):
        save(saver, run, step)
    saver.wait()
    assert [step for step, _ in saver.finished()] == [1, 2, 3]
    assert saved_steps(tmp_path) == [2, 3]


def test_a_full_disk_is_told_before_the_next_save(run, saver, tmp_path, monkeypatch):
    save(saver, run, 1)
    saver.wait()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", full)
        save(saver, run, 2)
        with pytest.raises(CheckpointError, match="step_000002: cannot be written.*No space left.*checkpoint.dir"):
            save(saver, run, 3)
    assert saved_steps(tmp_path) == [1]
    save(saver, run, 4)
    saver.wait()
    assert saved_steps(tmp_path) == [1, 4], "it may be tried again"
    assert not list(tmp_path.glob(".*")), "nor is anything left of it"
