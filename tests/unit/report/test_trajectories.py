"""Trajectories of every version and kind."""

from __future__ import annotations

import pytest

from fire_megatron.report.trajectories import Shades, body, index_line

SAMPLE = {
    "step": 1,
    "row": 3,
    "teacher": "math",
    "prompt": "1 + 1",
    "response": "= 2",
    "by_token": {
        "text": ["=", " 2"],
        "weight": [0.5, 1.5],
        "teacher_log_prob": [-1.0, None],
        "student_log_prob": [-3.0, -1.0],
    },
}


def test_a_body_has_columns_of_one_length():
    shown = body(SAMPLE)
    assert shown["texts"] == ["=", " 2"] and shown["prompt"] == "1 + 1"
    assert shown["numbers"]["weight"] == [0.5, 1.5] and shown["numbers"]["log_prob_gap"] == [2.0, None]
    cut = body({**SAMPLE, "by_token": {**SAMPLE["by_token"], "weight": [0.5], "mine": "x"}})
    assert set(cut["numbers"]) == {"teacher_log_prob", "student_log_prob", "log_prob_gap"}


@pytest.mark.parametrize("by_token", [None, [], {}, {"text": ["other"], "weight": [1.0]}, {"text": 3}])
def test_a_sample_without_numbers_by_token_is_shown_whole(by_token):
    assert body({**SAMPLE, "by_token": by_token}) == {"prompt": "1 + 1", "texts": ["= 2"], "numbers": {}}


def test_what_an_index_line_lacks_is_none():
    line = index_line(2, SAMPLE)
    assert (line["run"], line["step"], line["row"], line["kept"], line["threshold"]) == (2, 1, 3, None, None)


def quantities(bodies):
    shades = Shades(len(bodies))
    for one in bodies:
        shades.see(one)
    return shades.quantities()


def test_bounds_of_the_shades():
    def one(**numbers):
        return {"numbers": numbers}

    many = [one(weight=[1.0] * 98 + [0.2, 9.0], confidence=[0.3], log_prob_gap=[-3.0, 1.0], mine=[None, 2.0])]
    weight, confidence, gap, mine = quantities(many)
    assert (weight.key, weight.low, weight.high, weight.signed) == ("weight", 0.0, 2.0, False), "two outliers of 100"
    assert (confidence.low, confidence.high) == (0.0, 1.0), "by definition"
    assert (gap.low, gap.high, gap.signed) == (-3.0, 3.0, True), "0 is in the middle"
    assert (mine.key, mine.title) == ("mine", "mine") and mine.low < 2.0 < mine.high
    assert quantities([]) == [] and quantities([one(weight=[])]) == []


def test_of_many_some_are_looked_at():
    many = [{"numbers": {"weight": [float(place)] * 5000}} for place in range(1000)]
    shades = Shades(len(many))
    for one in many:
        shades.see(one)
    assert len(shades._values["weight"]) <= 300 * 1000
    (weight,) = shades.quantities()
    assert weight.low == pytest.approx(20, abs=8) and weight.high == pytest.approx(980, abs=8)
