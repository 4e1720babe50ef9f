"""The temperature of loss and engine: one name, and what is said where they differ."""

from __future__ import annotations

import pytest

from fire_megatron.config.errors import RecipeProblems
from fire_megatron.config.load import recipe_from_dict
from fire_megatron.config.loss import LossConfig
from fire_megatron.config.rules.training import sampling_notes


def recipe(rollout=None, **loss):
    return recipe_from_dict(
        {
            "run": {"name": "a", "dir": "runs/a", "steps": 1},
            "student": {"checkpoint": "s"},
            "teachers": {"math": {"checkpoint": "t"}},
            "data": {"train": [{"path": "p.jsonl"}]},
            "rollout": {"prompts_per_step": 1, "max_new_tokens": 1, **(rollout or {})},
            "loss": loss,
        }
    )


@pytest.mark.parametrize(
    ("rollout", "loss", "expected"),
    [
        (
            {"temperature": 0.7},
            {},
            ["rollout.temperature is 0.7 and loss.temperature 1", "; loss.temperature=0.7 makes"],
        ),
        ({"temperature": 0.7}, {}, ["importance correction takes", "above loss.importance.high (2)"]),
        ({"temperature": 0.7}, {"importance": {"mode": "off"}}, ["mode off nothing corrects for that"]),
        ({"temperature": 1}, {"temperature": 2}, ["rollout.temperature is 1 and loss.temperature 2"]),
        ({"temperature": 0}, {}, ["rollout.temperature is 0 and", "; rollout.temperature=1 makes"]),
        ({"top_p": 0.9}, {}, ["NOTE: rollout.top_p is 0.9, so", "; rollout.top_p=1 makes"]),
        ({"top_p": 0.9, "temperature": 0.5}, {}, ["; loss.temperature=0.5 and rollout.top_p=1 make them"]),
    ],
)
def test_samples_of_another_distribution_are_told(rollout, loss, expected):
    [note] = sampling_notes(recipe(rollout, **loss))
    assert all(text in note for text in expected), note


@pytest.mark.parametrize(
    ("rollout", "loss"),
    [
        ({}, {}),
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"temperature": 0.7, "top_p": 0.9}, {"estimator": "full"}),
    ],
)
def test_nothing_is_said_of_one_distribution_or_where_samples_need_not_be_of_it(rollout, loss):
    assert list(sampling_notes(recipe(rollout, **loss))) == []


def test_one_temperature_is_both_unless_a_side_has_its_own():
    assert LossConfig(estimator="full").temperatures == (1.0, 1.0)
    assert LossConfig(estimator="full", temperature=2.0).temperatures == (2.0, 2.0)
    assert LossConfig(estimator="topk", temperature=2.0, teacher_temperature=1.0).temperatures == (2.0, 1.0)
    assert LossConfig(estimator="topk", student_temperature=0.5).temperatures == (0.5, 1.0)


def test_a_side_has_no_temperature_of_its_own_in_sampled():
    with pytest.raises(RecipeProblems, match="loss.teacher_temperature: has no effect with estimator sampled"):
        recipe(teacher_temperature=2.0)
    assert recipe(student_temperature=1.0).loss.temperatures == (1.0, 1.0), "the same, written out"
