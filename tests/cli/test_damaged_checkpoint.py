"""A checkpoint that is not what was written is found out and left out: the run goes on from the one before it."""

from __future__ import annotations

import shutil

import pytest
from tiny_run import read_metrics, tiny_recipe, train, write_recipe

from fire_megatron.checkpoint.steps import saved_steps
from fire_megatron.cli.train import main


def flip_a_bit(path, place=0.5):
    """Damage that no size tells."""
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)


def weights(step):
    """The largest file of tensors of a step."""
    return max(step.glob("weights/*.distcp"), key=lambda path: path.stat().st_size)


def cut(path):
    """What a disk that was full leaves."""
    path.write_bytes(path.read_bytes()[:-1000])


DAMAGE = {
    "a bit of a tensor": (lambda step: flip_a_bit(weights(step)), "are not those that were written"),
    "a file cut short": (lambda step: cut(weights(step)), "is cut short"),
    "a bit of the metadata": (lambda step: flip_a_bit(step / "weights" / ".metadata"), "is not what was written"),
    "a bit of the values": (lambda step: flip_a_bit(step / "weights" / "common.pt"), "is not what was written"),
    "no values": (lambda step: (step / "weights" / "common.pt").unlink(), "cannot be read"),
    "checksums that are none": (lambda step: cut(step / "weights" / "checksums.json"), "cannot be read"),
}


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run of three steps with all of them saved, and its recipe as plain values."""
    folder = tmp_path_factory.mktemp("damaged")
    values = tiny_recipe(tiny, folder / "run", run__steps=3, checkpoint={"every": 1, "keep": 3})
    assert main(["--recipe", str(write_recipe(folder / "recipe.yaml", values))]) == 0
    return folder, values


def copy_of(finished, tmp_path):
    """The run in a folder of its own; returns its folder and a recipe that continues it."""
    folder, values = finished
    run = shutil.copytree(folder / "run", tmp_path / "run")
    values = {**values, "run": {**values["run"], "dir": str(run)}}
    return run, write_recipe(tmp_path / "recipe.yaml", values)


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_step_before_it_is_taken(finished, tmp_path, capsys, damage):
    run, recipe = copy_of(finished, tmp_path)
    spoil, says = DAMAGE[damage]
    spoil(run / "checkpoints" / "step_000003")
    assert main(["--recipe", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert says in out and f"resumed from {run}/checkpoints/step_000002 after step 2" in out
    assert (run / "checkpoints" / "damaged_step_000003").is_dir(), "kept to be looked at"
    assert saved_steps(run / "checkpoints") == [1, 2, 3]
    old, new = read_metrics(finished[0] / "run"), read_metrics(run)
    assert [line["loss"] for line in new] == [line["loss"] for line in old]


def test_two_damaged_steps(finished, tmp_path, capsys):
    run, recipe = copy_of(finished, tmp_path)
    for step in (2, 3):
        flip_a_bit(weights(run / "checkpoints" / f"step_{step:06d}"))
    assert main(["--recipe", str(recipe)]) == 0
    assert "after step 1" in capsys.readouterr().out


def test_without_a_whole_one_the_run_does_not_begin_anew(finished, tmp_path, capsys):
    run, recipe = copy_of(finished, tmp_path)
    for step in (1, 2, 3):
        flip_a_bit(weights(run / "checkpoints" / f"step_{step:06d}"))
    assert main(["--recipe", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert "none of the checkpoints" in error and error.count("are not those that were written") == 3
    assert saved_steps(run / "checkpoints") == [1, 2, 3], "nothing is moved or deleted"
    assert len(read_metrics(run)) == 3


def test_a_damaged_teacher(tiny, tmp_path, capsys):
    teacher = shutil.copytree(tiny / "math", tmp_path / "math")
    flip_a_bit(weights(teacher))
    assert train(tiny, tmp_path / "run", f"teachers.math.checkpoint={teacher}") == 2
    assert f"{weights(teacher)}: damaged" in capsys.readouterr().err
