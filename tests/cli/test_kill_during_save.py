"""SIGKILL at any moment of a save leaves a complete checkpoint that loads, never older than the last one reported.

The save runs in a fork of this process, which kills itself before the k-th operation on the file system, for every k
until a save gets through.
"""

from __future__ import annotations

import gc
import itertools
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import tiny_recipe

from fire_megatron.checkpoint.resuming import load_training_state
from fire_megatron.checkpoint.steps import find_latest, saved_steps
from fire_megatron.config.load import recipe_from_dict
from fire_megatron.platform import launch
from fire_megatron.train.lifecycle import Trainer

KEEP = 2
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
"""Audit events of Python that stand before a change of the file system."""


@pytest.fixture(scope="module")
def trainer(tiny, tmp_path_factory):
    """A student with an optimizer, ready to be saved."""
    folder = tmp_path_factory.mktemp("kill")
    recipe = recipe_from_dict(tiny_recipe(tiny, folder / "run", checkpoint__keep=KEEP, run__threads=1))
    made = Trainer(recipe, launch.start("cpu", threads=1))
    # What earlier tests have left, process groups and their threads among it, cannot be freed in a fork.
    gc.collect()
    gc.freeze()
    yield made
    gc.unfreeze()
    launch.stop()


def mark(trainer):
    """The weight that tells one save from another."""
    return trainer.run.student.model.decoder.final_layernorm.weight


def save(trainer, checkpoints, step, version):
    """Save a state that carries a number of its own."""
    with torch.no_grad():
        mark(trainer).fill_(version)
    saver = trainer.run.saver
    saver._blank = replace(saver._blank, checkpoints=checkpoints)
    trainer.step = step
    trainer.save()


def fork(action):
    """Run something in a fork; returns its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        torch.set_num_threads(1)
        action()
        code = 0
    finally:
        os._exit(code)


def killed(child):
    """Wait for a fork; whether it was killed (it must otherwise have succeeded)."""
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the save failed by itself"
    return False


def die_before(operation, folder):
    """Kill this process before its n-th operation on a path below ``folder``. Only for forks: it cannot be undone."""
    count = itertools.count(1)

    def hook(event, args):
        inside = event in EVENTS and isinstance(args[0], (str, Path)) and str(args[0]).startswith(str(folder))
        # shutil.rmtree deletes by a name relative to an open folder.
        inside = inside or (event in ("os.remove", "os.rmdir") and args[1] != -1)
        if inside and next(count) == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def check_latest(trainer, checkpoints, versions):
    """Load the newest checkpoint into the trainer's model and check that it is one of ``versions`` (step -> possible
    version numbers), all of whose tensors are of one save. Returns its step and version."""
    latest = find_latest(checkpoints)
    assert latest is not None
    with torch.no_grad():
        mark(trainer).fill_(-1)
    run = trainer.run
    state = load_training_state(latest, run.student.model, run.student.optimizer, grid=run.grid)
    assert state.step in versions, f"step {state.step}, expected one of {list(versions)}"
    values = set(mark(trainer).tolist())
    assert len(values) == 1 and values <= set(versions[state.step])
    return state.step, values.pop()


@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step again"])
def test_killed_before_any_operation(trainer, tmp_path, again):
    for step in (1, 2, 3):
        save(trainer, tmp_path, step, step)
    step, version = 3, 3
    kills = 0
    for operation in itertools.count(1):
        new_step, new_version = step + (not again), version + 1

        def attempt(operation=operation, new_step=new_step, new_version=new_version):
            die_before(operation, tmp_path)
            save(trainer, tmp_path, new_step, new_version)

        dead = killed(fork(attempt))
        kills += dead
        versions = {step: [version]}
        versions[new_step] = [*versions.get(new_step, []), new_version]
        step, version = check_latest(trainer, tmp_path, versions)
        assert len(saved_steps(tmp_path)) >= KEEP
        if not dead:
            assert (step, version) == (new_step, new_version), "reported as saved"
            break
    assert kills > 20
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"step_{step - 1:06d}", f"step_{step:06d}"]
