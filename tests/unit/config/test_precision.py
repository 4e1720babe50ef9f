"""What ``precision.dtype: null`` stands for."""

from __future__ import annotations

from typing import Any

import pytest

from fire_megatron.config.load import recipe_from_dict, recipe_to_dict
from fire_megatron.config.roles import resolved, roles


@pytest.mark.parametrize(("kind", "dtype"), [("cpu", "float32"), ("cuda", "bfloat16")])
def test_a_recipe_on_a_device(values: dict[str, Any], kind: str, dtype: str) -> None:
    """Open formats are named, the others stay; nothing else of the recipe changes."""
    fp8 = {"recipe": "tensorwise", "emulate": True}
    values["student"]["precision"] = {"fp8": fp8}
    values["teachers"]["math"]["precision"] = {"dtype": "float32"}
    recipe = recipe_from_dict(values)
    assert [role.precision.dtype for role in roles(recipe).values()] == [None, None, "float32"]
    here = resolved(recipe, kind)
    assert {path: role.precision.dtype for path, role in roles(here).items()} == {
        "student": dtype,
        "teachers.code": dtype,
        "teachers.math": "float32",
    }
    assert resolved(here, "cpu") == resolved(here, "cuda") == here
    expected = recipe_to_dict(recipe)
    expected["student"]["precision"]["dtype"] = expected["teachers"]["code"]["precision"]["dtype"] = dtype
    assert recipe_to_dict(here) == expected


def test_teachers_of_one_format_are_alike(values: dict[str, Any]) -> None:
    """However it is written, so that they can share a model."""
    values["teachers"]["math"]["precision"] = {"dtype": "bf16"}
    teachers = resolved(recipe_from_dict(values), "cuda").teachers
    assert teachers["math"].precision == teachers["code"].precision
