"""What a resumed run says of what has changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import save_hf, save_megatron
from tiny_run import tiny_recipe

from fire_megatron.checkpoint.convert import hf_to_megatron
from fire_megatron.checkpoint.fingerprint import model_fingerprint
from fire_megatron.config.errors import RecipeError
from fire_megatron.config.load import recipe_from_dict, recipe_to_dict
from fire_megatron.train.provenance import Provenance

MODELS = {"student": "s", "teachers.math": "m", "teachers.code": "c"}
STEP = 2


def provenance(models=MODELS, held_out="", **changes):
    """Of a tiny recipe with changes."""
    recipe = recipe_from_dict(tiny_recipe(Path("in"), Path("out"), **changes))
    return Provenance.saved(Provenance(recipe_to_dict(recipe), models, held_out).record())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, ""),
        ({"run__dir": "elsewhere"}, ""),
        ({"run__resume": "must", "checkpoint__dir": "there"}, ""),
        ({"student__checkpoint": "moved", "teachers__math__checkpoint": "moved"}, ""),
        ({"loss": {"estimator": "full"}}, "loss.estimator sampled -> full"),
        ({"run__steps": 8}, "run.steps 4 -> 8"),
        ({"data__system_prompt": "x" * 70}, f"data.system_prompt null -> {'x' * 60}..."),
        ({"checkpoint__final": False}, "checkpoint.final true -> false"),
        (
            {"loss": {"hooks": [{"name": "filter", "percentile": 30}]}},
            "loss.hooks.0.percentile 20.0 -> 30.0; loss.hooks.1 removed",
        ),
        ({"run__plugins": ["a"]}, "run.plugins.0 added"),
        (
            {"optimizer": {"lr": 3e-5}, "metrics__samples": 2},
            "optimizer.lr 1e-05 -> 3e-05; metrics.samples 0 -> 2; so the learning rate of step 3 is 3e-05, which was "
            "to be 1e-05",
        ),
    ],
)  # fmt: skip
def test_changes(changes, told):
    assert provenance(**changes).changes(provenance(), STEP) == told


def test_a_schedule_over_more_steps():
    before, now = (provenance(run__steps=steps, optimizer={"schedule": "cosine"}) for steps in (3, 5))
    assert before.changes(before, 3) == ""
    told = now.changes(before, 3)
    assert told == "run.steps 3 -> 5; so the learning rate of step 4 is 1.46e-06, which was to be 0"


def test_other_models():
    other = {**MODELS, "teachers.math": "other"}
    assert provenance(other).changes(provenance(), STEP) == "teachers.math.checkpoint holds another model"
    moved = provenance(other, teachers__math__checkpoint="new").changes(provenance(), STEP)
    assert moved == "teachers.math.checkpoint in/math -> new"
    assert provenance(held_out="x").changes(provenance(), STEP) == "evaluation.prompts holds other prompts"
    added = {**MODELS, "teachers.law": "l"}
    told = provenance(added, teachers__law={"checkpoint": "law"}).changes(provenance(), STEP)
    assert told == "teachers.law added"
    assert provenance().changes(provenance(added, teachers__law={"checkpoint": "law"}), STEP) == "teachers.law removed"


def test_another_student():
    provenance(student__checkpoint="moved").require_student(provenance(), Path("step_2"))
    other = {**MODELS, "student": "other"}
    with pytest.raises(
        RecipeError, match="^student.checkpoint: step_2 was trained from in/student, and new holds anoth"
    ):
        provenance(other, student__checkpoint="new").require_student(provenance(), Path("step_2"))
    with pytest.raises(RecipeError, match="was trained from in/student, which holds another model by now"):
        provenance(other).require_student(provenance(), Path("step_2"))


def test_what_an_earlier_version_recorded():
    """Keys that it did not have yet are as if left out; of keys that are gone the rest is compared all the same."""
    before = provenance()
    del before.recipe["optimizer"]["guard"], before.recipe["evaluation"]
    assert provenance().changes(before, STEP) == ""
    before.recipe["run"]["colour"] = "red"
    assert "run.colour removed" in provenance().changes(before, STEP)
    assert Provenance.saved({"first_eval": {}}) is None


def test_fingerprints_of_models(tmp_path):
    save_hf("qwen3", tmp_path / "hf", num_hidden_layers=1)
    first, again = tmp_path / "a", tmp_path / "deeper" / "b"
    for folder in (first, again):
        hf_to_megatron(tmp_path / "hf", folder)
    assert model_fingerprint(first) == model_fingerprint(again), "converted twice"
    save_megatron("qwen3", tmp_path / "other", num_hidden_layers=1, seed=1)
    save_megatron("qwen3", tmp_path / "stretched", num_hidden_layers=1, rope_theta=5e5)
    prints = {model_fingerprint(tmp_path / name) for name in ("a", "other", "stretched")}
    assert len(prints) == 3
    for folder in (first, again):  # as of a folder from elsewhere
        (folder / "weights" / "checksums.json").unlink()
    assert model_fingerprint(first) == model_fingerprint(again) not in prints
    file = next((again / "weights").glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert model_fingerprint(first) != model_fingerprint(again)
