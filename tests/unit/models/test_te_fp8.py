"""FP8 of Transformer Engine where there is no GPU: what can be built, loaded and saved, and the ranks that a model's
largest magnitudes are put together over. What only a GPU can show is in tests/gpu."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from models import save_megatron
from processes import call

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3-moe", "mistral")
RECIPES = {
    "delayed": "TEDelayedScaling",
    "tensorwise": "Float8CurrentScaling",
    "blockwise": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}
ROUNDING = 16 / 448 + 1e-4
"""Half the distance of the largest E4M3 numbers, over the largest."""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of one process for all cases, since starting it takes most of the time."""
    folder = tmp_path_factory.mktemp("te-fp8")
    for family in FAMILIES:
        sizes = {"moe_intermediate_size": 64} if family == "qwen3-moe" else {}
        save_megatron(family, folder / family, head_dim=32, intermediate_size=128, **sizes)
    return json.loads(call(Path(__file__).with_name("te_fp8.py"), folder, *FAMILIES, timeout=600).splitlines()[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_recipe_has_the_tensors_of_the_checkpoint_at_tp2_pp2(report, family):
    assert report["names"][family] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_saved_by_local_layers_loads_bit_by_bit_at_tp2_pp2(report, family):
    assert report["loads"][family] == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_amax_is_reduced_over_the_models_own_stage(report, recipe):
    found = report["amax"][f"student {recipe}"]
    assert found["trained"] == [[RECIPES[recipe], [0, 1, 2, 3]]] * 2
    assert found["tokens"] == 2 * (32 if recipe == "mxfp8" else 16), "a pack of 14 tokens, on two tensor ranks"


def test_nothing_is_called_that_is_going_to_be_removed(report):
    assert {name: case["old"] for name, case in report["amax"].items()} == {name: [] for name in report["amax"]}


def test_the_teachers_group_is_its_own(report):
    assert report["amax"]["teacher tensorwise"]["trained"] == [["Float8CurrentScaling", [8, 9]]] * 2


def test_amax_over_tensor_ranks_alone(report):
    assert report["amax"]["student tp_only"]["trained"] == [["TEDelayedScaling", [2, 3]]] * 2


def test_first_layers_in_bfloat16_and_recomputed_layers(report):
    first, second = report["amax"]["student first_last"]["trained"]
    assert first == [None, None] and second == ["Float8CurrentScaling", [0, 1, 2, 3]]
    assert report["amax"]["student recompute"]["trained"] == [["Float8CurrentScaling", [0, 1, 2, 3]]] * 2


def test_sampling_is_not_in_fp8(report):
    assert {name: case["sampled"] for name, case in report["amax"].items()} == {
        name: [[None, None]] * 2 for name in report["amax"]
    }


def test_fp8_weights_are_quantised_from_the_checkpoint_and_masters_are_not(report):
    found = report["weights"]
    assert found["quantised"] == ["Float8Tensor", "Parameter"]
    assert 0 < found["error"] < ROUNDING
    assert found["masters"] and not found["kept"], "float32 weights begin with the checkpoint's values"
    assert found["distributed"] == [True, True, "tensorwise"]


def test_fp8_weights_are_saved_as_what_they_were_quantised_from(report):
    found = report["weights"]
    assert found["resumed"] and found["in bfloat16"]
    assert 0 < found["resumed error"] < ROUNDING


@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_weights_load_in_parts(report, family):
    assert all(0 < far < ROUNDING for far in report["weight shards"][family])


def test_scales_of_delayed_scaling_resume_in_any_layout(report):
    found = report["histories"]
    assert found["before"] == [], "before the first pass there is nothing"
    assert found["same"] == found["tensors"] == 4 * 4 * 4, "layers, matrices, tensors"
    assert found["last stage"] == [2, 3] and found["last same"]
    assert found["longer"], "a history of another length begins anew"


def test_what_a_gpu_cannot_do(report):
    said = report["refusals"]
    assert "8.9 or higher" in said["8 tensorwise"] and "10.0 or higher" in said["9 mxfp8"]
    assert said["10 mxfp8"] is said["9 blockwise"] is None
