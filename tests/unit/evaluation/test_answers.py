r"""The last ``\boxed{}``, and every right answer of the benchmarks against itself."""

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fire_megatron.data.rows import read_rows
from fire_megatron.evaluation.answers import last_boxed
from fire_megatron.evaluation.equality import equal
from fire_megatron.evaluation.judge import Judge

GOLD = json.loads((Path(__file__).parents[2] / "data" / "gold_answers.json").read_text(encoding="utf-8"))
"""Every distinct right answer of AIME 2024 and 2025, AMC 2023, HMMT 2025, MATH500, Minerva math and OlympiadBench that
is not a whole number."""
BENCHMARKS = "FIRE_BENCHMARKS"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("no box", None),
        ("", None),
        (r"\boxed{42}", "42"),
        (r"first \boxed{1}, then \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed { 7 }", "7"),
        (r"\boxed{}", ""),
        (r"\\boxed{5}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{a \\}", r"a \\"),
        (r"\boxed{\boxed{3}}", r"\boxed{3}"),
        (r"\boxed{x + \boxed{y}}", r"x + \boxed{y}"),
        (r"\boxed{1} and an end cut short: \boxed{2", None),
        (r"\boxed{1} and \boxed{\frac{1}{2}", None),
        (r"\boxed{1 \boxed{2}", "2"),
        (r"{ prose with a stray brace, \boxed{9}", "9"),
        (r"} prose with a stray brace, \boxed{9}", "9"),
        (r"\boxed 5", "5"),
        (r"so $\boxed7$", "7"),
        (r"so $\boxed 70$.", "70"),
        (r"so $\boxed -1.5$.", "-1.5"),
        (r"\boxed{3}, or \boxed 70.", "3, 70"),
        (r"\(\boxed x\)", "x"),
        (r"$\boxed\pi$", r"\pi"),
        (r"in \boxed{5} as \boxed was asked", "5"),
        (r"in \boxed{5} as \boxed 7x", "5"),
        (r"\fbox{5}", None),
        (r"\boxedness{5}", None),
        ("\\boxed{\0\ud800}", "\0\ud800"),
        ("\\boxed{two\nlines}", "two\nlines"),
    ],
)
def test_last_boxed(text, answer):
    assert last_boxed(text) == answer


balanced = st.recursive(
    st.text(st.characters(exclude_characters="{}\\"), max_size=8) | st.sampled_from([r"\{", r"\}", r"\frac", r"\\ "]),
    lambda inner: st.builds("{{{}}}".format, inner) | st.builds("{} {}".format, inner, inner),
    max_leaves=8,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(balanced, max_size=3), balanced, balanced)
def test_the_last_of_many_boxes(earlier, content, after):
    text = "".join(f"\\boxed{{{box}}}, no: " for box in earlier) + f"\\boxed{{{content}}} {after}"
    assert last_boxed(text) == content.strip()


@settings(deadline=None)
@given(st.lists(st.sampled_from(["{", "}", "\\", "\\boxed{", "x", "\\{", " "])).map("".join))
def test_whatever_is_in_a_box_has_its_braces_closed(text):
    found = last_boxed(text)
    if found is not None:
        assert found in text or text.count("\\boxed") > 1
        bare = re.sub(r"\\+boxed\s*\{", "{", found)
        bare = re.sub(r"\\.", "", bare, flags=re.DOTALL)
        assert bare.count("{") == bare.count("}")


def test_a_long_text_of_unclosed_boxes_is_read_in_linear_time():
    assert last_boxed("\\boxed{" * 200_000) is None
    assert last_boxed("\\" * 200_000 + "\\boxed 7" * 100_000) == "7"
    assert last_boxed("\\boxed\\a" + " " * 200_000 + "b") is None
    assert last_boxed("\\boxed{" * 200_000 + "}" * 200_000).count("\\boxed") == 199_999


def rewritten(answer):
    r"""The same answer as a model may write it: without ``$``, with ``\dfrac``, ``\left``, ``\right`` and spaces."""
    text = re.sub(r"(?<!\\)\$", "", answer).replace(r"\frac", r"\dfrac")
    text = re.sub(r"(?<![\\t])\(", r"\\left( ", text).replace(")", r" \right)")
    return f" {text}. "


def no_algebra(right, given):
    pytest.fail(f"{right!r} and {given!r} need no algebra")


def test_every_right_answer_is_equal_to_itself():
    for answer in GOLD:
        assert last_boxed(f"Thus $\\boxed{{{answer}}}$.") == answer.strip()
        assert equal(answer, answer, no_algebra), answer
        assert equal(answer, rewritten(answer), no_algebra), answer


def test_right_answers_differ_from_others_of_like_length():
    with Judge() as judge:
        same = [pair for pair in zip(GOLD[::20], GOLD[1::20], strict=False) if judge.equal(*pair)]
    assert not same


@pytest.mark.skipif(BENCHMARKS not in os.environ, reason=f"{BENCHMARKS} names no folder of benchmark files (*.jsonl)")
def test_benchmark_files():
    files = sorted(Path(os.environ[BENCHMARKS]).glob("*.jsonl"))
    assert files, f"no *.jsonl in {os.environ[BENCHMARKS]}"
    with Judge() as judge:
        for file in files:
            for place, row in read_rows(file):
                answer = last_boxed(f"{row['problem']} The answer is $\\boxed{{{row['answer']}}}$.")
                assert judge.equal(row["answer"], answer), place
                assert judge.equal(row["answer"], rewritten(row["answer"])), place
