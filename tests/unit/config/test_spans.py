"""Which ranks hold which role, and what of it makes no sense."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fire_megatron.config.checks import check_recipe
from fire_megatron.config.errors import RecipeError, RecipeProblems
from fire_megatron.config.load import recipe_from_dict
from fire_megatron.config.spans import Span, parse_span


def spoilt(values, world_size=4, **changes):
    for key, value in changes.items():
        *sections, last = key.split("__")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
    with pytest.raises(RecipeProblems) as caught:
        check_recipe(recipe_from_dict(values), world_size=world_size)
    return str(caught.value)


def test_spans():
    assert parse_span(None, 6) == Span(0, 6)
    assert parse_span("2-4", 6) == Span(2, 3) and list(parse_span("2-4", 6).ranks) == [2, 3, 4]
    assert parse_span("3", 6) == Span(3, 1)
    assert str(Span(2, 3)) == "ranks 2-4" and str(Span(2, 1)) == "rank 2"


@given(*(st.tuples(st.integers(0, 9), st.integers(1, 9)) for _ in range(2)))
def test_spans_meet_where_they_have_a_rank_in_common(one, other):
    first, second = Span(*one), Span(*other)
    assert first.meets(second) == second.meets(first) == bool(set(first.ranks) & set(second.ranks))


@pytest.mark.parametrize("ranks", ["a-b", "-1", "1-", "0-1,3", "1.5", "0 - 1"])
def test_what_is_no_span(values, ranks):
    values["student"]["ranks"] = ranks
    with pytest.raises(RecipeError, match=r"student\.ranks.*first-last, such as 8-15, or one rank in quotes"):
        recipe_from_dict(values)


def test_a_map_that_fits(values):
    values["student"] |= {"ranks": "0-1", "parallel": {"tensor": 2}, "offload": True}
    values["teachers"]["math"] |= {"ranks": "1-3", "parallel": {"pipeline": 3}, "offload": True}
    values["teachers"]["code"] |= {"ranks": "2-2"}
    values["rollout"]["group_size"] = 2
    check_recipe(recipe_from_dict(values), world_size=4)
    check_recipe(recipe_from_dict(values), world_size=None)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"teachers__math__ranks": "2-4"}, "teachers.math.ranks: 2-4 reaches beyond the run's 4 ranks (0-3)"),
        ({"teachers__math__ranks": "3-2"}, "teachers.math.ranks: 3-2 ends before it starts; write first-last"),
        ({"student__ranks": "1-3"}, "student.ranks: 1-3 does not start at rank 0, which writes metrics"),
        (
            {"student__ranks": "0-0", "teachers__math__ranks": "1-1", "teachers__code__ranks": "1-1"},
            "student.ranks: 2 of the run's 4 ranks hold no role (2, 3); give them to the student or a teacher",
        ),
        (
            {"teachers__math__ranks": "1-3", "teachers__math__parallel": {"tensor": 2}},
            "which does not divide the 1-3 of teachers.math.ranks: 3; give a multiple of 2 ranks or lower one of them",
        ),
        (
            {"student__ranks": "0-1", "teachers__math__ranks": "2-2", "teachers__code__ranks": "3-3",
             "teachers__math__offload": True},
            "teachers.math.offload: true, but no other role is on its ranks",
        ),
        (
            {"student__ranks": "0-1", "teachers__math__ranks": "2-2", "teachers__code__ranks": "3-3",
             "student__offload": True},
            "student.offload: true, but no other role is on its ranks",
        ),
        ({"rollout__group_size": 2}, "rollout.group_size: 2, but every teacher shares the student's ranks"),
    ],
)  # fmt: skip
def test_what_makes_no_sense(values, changes, expected):
    assert expected in spoilt(values, **changes)
