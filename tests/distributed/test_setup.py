"""Building a run: who holds what, what is shared, and a mistake in one role that the others must not wait for."""

from __future__ import annotations

import shutil

import pytest
import torch.distributed as dist
from tiny_run import make_inputs, tiny_recipe

from fire_megatron.config.checks import check_recipe
from fire_megatron.config.errors import CheckpointError
from fire_megatron.config.load import recipe_from_dict
from fire_megatron.train.lifecycle import Trainer

pytestmark = pytest.mark.world_size(2)
APART = {"student__ranks": "0-0", "teachers__math__ranks": "1-1", "teachers__code__ranks": "1-1"}


@pytest.fixture(scope="module")
def inputs(world, folder):
    if world.is_main:
        make_inputs(folder, num_hidden_layers=1)
        shutil.copytree(folder / "math", folder / "torn")
        for part in (folder / "torn" / "weights").glob("*.distcp"):
            part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    dist.barrier()
    return folder


def build(world, inputs, **changes):
    if world.size == 4:
        changes = {"student__ranks": "0-1", "teachers__math__ranks": "2-3", "teachers__code__ranks": "2-3", **changes}
    else:
        changes = {**APART, **changes}
    recipe = recipe_from_dict(tiny_recipe(inputs, inputs / "run", **changes))
    check_recipe(recipe, world_size=world.size)
    return Trainer(recipe, world).setup


def test_ranks_hold_their_own_roles(world, inputs):
    prepared = build(world, inputs)
    students = world.rank < world.size // 2
    assert (prepared.run is not None) == students == prepared.grid.is_member
    assert sorted(prepared.pool.teachers) == ([] if students else ["code", "math"])
    assert prepared.pool.remote == ("code", "math") and prepared.pool.shared == ()


@pytest.mark.parametrize("offload", [False, True])
def test_names_of_one_checkpoint_share_a_model(world, inputs, offload):
    # Said in other words: a path with a detour, a layer spec that is the automatic one.
    same = {"teachers__code__checkpoint": str(inputs / "run" / ".." / "math"), "teachers__code__layer_spec": "local"}
    flags = {"teachers__math__offload": offload}  # one of the names is enough
    teachers = build(world, inputs, **same, **flags).pool.teachers
    if teachers:
        assert teachers["math"].model is teachers["code"].model
        assert teachers["math"].offload is teachers["code"].offload
        away = [p.untyped_storage().nbytes() == 0 for p in teachers["math"].model.parameters()]
        assert all(away) if offload else not any(away)


@pytest.mark.parametrize(
    "change", [{"precision": {"dtype": "bfloat16"}}, {"vocab_multiple": 8}, {"checkpoint": "code"}]
)
def test_names_that_differ_in_anything_do_not(world, inputs, change):
    changes = {"teachers__code__checkpoint": str(inputs / "math")}
    changes |= {f"teachers__code__{key}": value for key, value in change.items()}
    if change.get("checkpoint"):
        changes["teachers__code__checkpoint"] = str(inputs / change["checkpoint"])
    teachers = build(world, inputs, **changes).pool.teachers
    assert not teachers or teachers["math"].model is not teachers["code"].model


@pytest.mark.parametrize("role", ["student", "teachers__math"])
def test_a_checkpoint_cut_short_is_told_on_every_rank(world, inputs, role):
    with pytest.raises(CheckpointError) as caught:
        build(world, inputs, **{f"{role}__checkpoint": str(inputs / "torn")})
    assert caught.value.everywhere and "torn" in str(caught.value)
    dist.barrier()
