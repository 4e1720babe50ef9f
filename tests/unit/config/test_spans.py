"""Which ranks hold which role, and what of it makes no sense."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fire_megatron.config.errors import RecipeError
from fire_megatron.config.load import recipe_from_dict
from fire_megatron.config.spans import Span, parse_span


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
