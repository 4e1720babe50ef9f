"""Every recipe that is shipped loads, agrees with itself, and finds the prompts that come with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import write_tokenizer

from fire_megatron.config.checks import RECIPE_RULES, role_problems
from fire_megatron.config.load import load_recipe, recipe_from_dict, recipe_to_dict
from fire_megatron.config.roles import routes
from fire_megatron.config.rules.facts import Facts
from fire_megatron.config.rules.model import checkpoints
from fire_megatron.data.prompts import read_prompts
from fire_megatron.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path for suffix in ("*.yaml", "*.yml") for path in (ROOT / "recipes").rglob(suffix))


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
    """But the models, which the user makes."""
    facts = Facts(recipe, None)
    rules = [rule for rule in RECIPE_RULES if rule is not checkpoints]
    assert len(rules) == len(RECIPE_RULES) - 1
    found = [problem for rule in rules for problem in rule(facts)]
    found += [problem for role in facts.roles.values() for problem in role_problems(role)]
    assert [str(problem) for problem in found] == []


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
