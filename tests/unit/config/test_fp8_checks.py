"""``precision.fp8`` against a role's other settings and its model."""

from __future__ import annotations

from typing import Any

import pytest

from fire_megatron.config.checks import check_recipe
from fire_megatron.config.errors import RecipeProblems
from fire_megatron.config.load import recipe_from_dict

Values = dict[str, Any]


def with_fp8(values: Values, role: str = "student", *, dtype: str | None = "bfloat16", **fp8: Any) -> Values:
    """The recipe for a GPU, with FP8 in a role."""
    values["run"]["device"] = "cuda"
    section = values["student"] if role == "student" else values["teachers"][role]
    section["precision"] = {"dtype": dtype, "fp8": fp8}
    return values


def complaint(values: Values) -> str:
    with pytest.raises(RecipeProblems) as caught:
        check_recipe(recipe_from_dict(values), world_size=None)
    return str(caught.value)


@pytest.mark.parametrize(
    "fp8",
    [
        {},
        {"recipe": "delayed", "amax_history": 16, "amax_algorithm": "most_recent", "margin": 1},
        {"recipe": "blockwise", "param_gather": True, "first_last_bf16": 1},
        {"recipe": "mxfp8", "format": "e4m3"},
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "bf16", None])
def test_what_works_passes(values: Values, fp8: Values, dtype: str | None) -> None:
    check_recipe(recipe_from_dict(with_fp8(values, dtype=dtype, **fp8)), world_size=None)
    if fp8.get("recipe") != "delayed":
        check_recipe(recipe_from_dict(with_fp8(values, "math", **fp8)), world_size=None)


@pytest.mark.parametrize(
    ("role", "fp8", "words"),
    [
        ("student", {"first_last_bf16": 2}, ("student.precision.fp8.first_last_bf16", "4, over 1", "at most 1")),
        ("math", {"first_last_bf16": 4}, ("teachers.math.precision.fp8.first_last_bf16", "at most 3")),
        ("student", {"first_last_bf16": 1, "recipe": "delayed"}, ("first_last_bf16", "recipe tensorwise")),
        ("student", {"dtype": "float32"}, ("student.precision.dtype", "set it to bfloat16")),
        ("math", {"recipe": "delayed"}, ("teachers.math.precision.fp8.recipe", "take tensorwise")),
        ("student", {"recipe": "delayed", "param_gather": True}, ("fp8.param_gather", "tensorwise or blockwise")),
        ("student", {"recipe": "mxfp8", "param_gather": True}, ("fp8.param_gather", "tensorwise or blockwise")),
    ],
)
def test_what_does_not_is_refused(values: Values, role: str, fp8: Values, words: tuple[str, ...]) -> None:
    said = complaint(with_fp8(values, role, **fp8))
    assert all(word in said for word in words), said


def test_stages_too_short_for_the_layers_in_bfloat16(values: Values) -> None:
    values["teachers"]["math"]["parallel"] = {"pipeline": 4}
    said = complaint(with_fp8(values, "math", first_last_bf16=3))
    assert "over 4 pipeline stages; at most 2" in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"run": {"device": "cpu"}}, ("student.precision.fp8", "run.device is cpu", "fp8.emulate=true")),
        ({"student": {"layer_spec": "local"}}, ("student.precision.fp8", "layer_spec is local")),
        ({"optimizer": {"distributed": False}}, ("fp8.param_gather", "optimizer.distributed=true")),
        ({"student": {"offload": True}}, ("fp8.param_gather", "student.offload")),
    ],
)
def test_what_the_rest_of_the_recipe_rules_out(values: Values, change: Values, words: tuple[str, ...]) -> None:
    with_fp8(values, recipe="tensorwise", param_gather=True)
    for section, settings in change.items():
        values.setdefault(section, {}).update(settings)
    said = complaint(values)
    assert all(word in said for word in words), said


def test_teachers_need_no_optimizer_for_fp8_weights(values: Values) -> None:
    values["optimizer"] = {"distributed": False}
    check_recipe(recipe_from_dict(with_fp8(values, "math", param_gather=True)), world_size=None)
