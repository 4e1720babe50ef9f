"""Texts that are the same problem, and texts that are not."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fire_megatron.prepare.same_text import plain, words

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is two?", "  what IS\n\ttwo? "),
        ("The ﬁrst ２", "the first 2"),
        ("Find $x + 1$.", "Find \\( x+1 \\)."),
        ("Find $$x+1$$.", "Find \\[x\\,+\\;1\\]."),
        ("$\\left(\\dfrac{1}{2}\\right)$", "$\\bigl( \\frac{ 1 }{ 2 } \\bigr)$"),
        ("$5\\cdot5$", "$5 \\cdot 5$"),
        ("$a~b\\quad c$", "$a b c$"),
        ("It costs \\$5.", "It costs $5$."),
        ("naïve", unicodedata.normalize("NFD", "naïve")),
        ("Find x.", f"Find x.\n{BOXED}"),
        ("Find x.", f"{BOXED}\nFind x.".replace(BOXED, "").strip() + f"\n\n{BOXED.upper()}"),
        ("Find x.", "Find x. Let's think step by step and output the final answer within \\boxed{}."),
        ("Find x.", "Find x. Let’s think step by step."),
        ("Find x.", "Find x.\nPut your final answer in $\\boxed{ }$"),
        ("Find x.", f"Find x. Think step by step. {BOXED}"),
        (
            "Find x.",
            "Solve the following math problem step by step. The last line of your response should be of the form "
            "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\nFind x.\n\n"
            'Remember to put your answer on its own line after "Answer:".',
        ),
        ("", BOXED),
    ],
)
def test_the_same(one, other):
    assert plain(one) == plain(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Find $x + 1$.", "Find $x + 2$."),
        ("Find $x + 1$.", "Find $x - 1$."),
        ("Sort 1 2 3", "Sort 12 3"),
        ("a therapist", "a the rapist"),
        ("$a \\\\ b$", "$a b$"),
        ("$\\leftarrow$", "$arrow$"),
        ("Why do we think step by step?", "Why do we?"),
        ("A lazy cat reasons step by step", "A lazy cat"),
        ("Put the answer within a box.", ""),
    ],
)
def test_not_the_same(one, other):
    assert plain(one) != plain(other)


@given(st.text(max_size=60), st.sampled_from(["\n", "  ", "\t \n"]))
def test_spaces_around_and_an_instruction_behind_change_nothing(text, space):
    assert plain(f"{space}{text}{space}") == plain(text)
    assert plain(f"{text}.{space}{BOXED}") == plain(f"{text}.")


@given(st.text(max_size=60))
def test_a_plain_text_has_no_needless_space(text):
    found = plain(text)
    assert found == found.strip() and "  " not in found and "$" not in found


def test_words():
    assert words(plain("Let $x_{1}=\\frac{3}{4}$, don't!")) == ["let", "x", "1", "frac", "3", "4", "don", "t"]
    assert words(plain("求方程 x 的解")) == ["求", "方", "程", "x", "的", "解"], "Han has no spaces"
