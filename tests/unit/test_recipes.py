"""Every recipe that is shipped loads, agrees with itself, and finds the prompts that come with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import write_tokenizer

from fire_megatron.config import checks
from fire_megatron.config.load import load_recipe, recipe_from_dict, recipe_to_dict
from fire_megatron.config.roles import routes
from fire_megatron.data.prompts import read_prompts
from fire_megatron.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path for suffix in ("*.yaml", "*.yml") for path in (ROOT / "recipes").rglob(suffix))
NEEDS_CHECKPOINTS = (checks._checkpoints,)
"""The one check that is left out: the models are made by the user."""


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Paths in the recipes are from its root."""
    monkeypatch.chdir(ROOT)


def test_there_are_recipes():
    assert RECIPES


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def recipe(request):
    """Each in turn."""
    return load_recipe(request.param)


def test_the_checks_find_nothing(recipe):
    context = checks.Context(recipe, None, {})
    left = [check for check in checks.CHECKS if check not in NEEDS_CHECKPOINTS]
    assert len(left) == len(checks.CHECKS) - len(NEEDS_CHECKPOINTS)
    assert [str(problem) for check in left for problem in check(context)] == []


def test_it_is_the_same_with_every_default_written_out(recipe):
    assert recipe_from_dict(recipe_to_dict(recipe)) == recipe


def test_prompts_are_there_and_every_label_has_a_teacher(recipe, tmp_path):
    """With a tokenizer that knows none of the words; lengths are the real tokenizer's business."""
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    labels = set(routes(recipe))
    for sources in (recipe.data.train, recipe.evaluation.prompts):
        if sources:
            prompts, _ = read_prompts(recipe.data, sources, tokenizer, labels)
            named = {label for prompt in prompts for label, _ in prompt.shares}
            assert named == labels, "every teacher has something to teach"
