"""Recipes for clusters, checked as their runs would be, on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from fire_megatron.config.load import load_recipe
from fire_megatron.config.roles import roles
from fire_megatron.plan.hardware import GPUS
from fire_megatron.plan.plan import like_ranks, make_job, span_text

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(("name", "ranks", "kinds"), [("qwen3_1024", 1024, 6), ("qwen3_math_code", 32, 3)])
def test_shipped_recipes(name, ranks, kinds):
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    job = make_job(recipe, world_size=ranks, gpu=GPUS["h100"], models=ROOT / "recipes" / "models")
    assert {role.precision.dtype for role in roles(job.recipe).values()} == {"bfloat16"}, "the default of a GPU"
    alike = like_ranks(job)
    assert len(alike) == kinds
    assert sorted(rank for group in alike for rank in group) == list(range(ranks))


def test_ranks_in_words():
    assert span_text([0, 1, 2, 5, 8, 9]) == "0-2, 5, 8-9"
