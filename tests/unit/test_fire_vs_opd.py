"""The study benchmarks/fire_vs_opd: its checker, and that its arms differ in nothing but the hooks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.fire_vs_opd.analyse import interval
from benchmarks.fire_vs_opd.pretrain import VOCABULARY, make_tokenizer
from benchmarks.fire_vs_opd.study import ARMS, Study
from benchmarks.fire_vs_opd.tasks import DOMAINS, MAX_NEW_TOKENS, is_right, problems
from fire_megatron.config.load import recipe_to_dict
from fire_megatron.data.tokenizer import load_tokenizer


def test_results_worked_out_by_hand():
    assert DOMAINS["math"].result("47+85+36+12=") == "180"
    assert DOMAINS["math"].result("10+11+12+13=") == "046"
    # 38152 reversed is 25183; its first two swapped 52183; first to the end 21835; ends exchanged 51832; plus one 62943.
    assert DOMAINS["code"].result("38152|rsfxi=") == "62943"
    assert DOMAINS["code"].result("90909|iiiii=") == "45454"


@pytest.mark.parametrize("label", DOMAINS)
def test_solutions_are_right_in_every_order_and_fit(label):
    rng = random.Random(3)
    for problem in problems(label, 200, seed=5):
        solutions = {DOMAINS[label].solution(problem, rng) for _ in range(20)}
        assert len(solutions) > 3, "there are forks"
        assert all(is_right(label, problem, solution, truncated=False) for solution in solutions)
        assert all(len(solution) + 1 < MAX_NEW_TOKENS for solution in solutions)
        assert set(problem + "".join(solutions)) <= set(VOCABULARY)


def test_a_solution_as_it_should_look():
    solution = DOMAINS["math"].solution("47+85+36+12=", random.Random(0))
    first, *others = solution.split(";")
    assert len(others) == 2 and solution.endswith("=180#180")
    a, b = map(int, first[: first.index(":")].split("+"))
    assert first == f"{a}+{b}:{a % 10 + b % 10:02d},{(a + b - (a % 10 + b % 10) % 10) // 10:02d}={a + b:03d}"


@pytest.mark.parametrize(
    "response",
    ["", "#", "180", "#18", "#1800", "#180#180", "#180;", "#181#180", "#081"],
)
def test_wrong_answers(response):
    assert not is_right("math", "47+85+36+12=", response, truncated=False)


def test_the_way_does_not_count_but_the_end_does():
    assert is_right("math", "47+85+36+12=", "47+85:12,13=131#180", truncated=False)
    assert not is_right("math", "47+85+36+12=", "47+85:12,13=132#180", truncated=True)


def test_problems_are_distinct_repeat_and_leave_out(tmp_path):
    first = problems("math", 300, seed=1)
    assert first == problems("math", 300, seed=1) != problems("math", 300, seed=2)
    assert len(set(first)) == 300
    assert not set(problems("math", 300, seed=1, without=frozenset(first[:50]))) & set(first[:50])
    study = Study(tmp_path)
    for label, held_out in study.held_out.items():
        assert not any(f'"{problem}"' in study.prompts(label).read_text() for problem in held_out)


def test_the_tokenizer_has_a_token_a_character(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    text = DOMAINS["code"].problem(random.Random(0)) + DOMAINS["math"].problem(random.Random(0))
    ids = tokenizer.encode(text)
    assert ids == [VOCABULARY[character] for character in text]
    assert tokenizer.decode([*ids, *tokenizer.eos_ids]) == text
    assert tokenizer.eos_ids == (VOCABULARY["<eos>"],) and tokenizer.vocab_size == len(VOCABULARY)


def test_arms_differ_in_their_hooks_alone():
    study, left = Study(Path("out")), {}
    for arm in ARMS:
        recipe = recipe_to_dict(study.recipe(arm, 3))
        assert recipe["run"].pop("name") in recipe["run"].pop("dir")
        hooks = [hook["name"] for hook in recipe["loss"].pop("hooks")]
        left[arm] = (hooks, recipe)
    assert {arm: hooks for arm, (hooks, _) in left.items()} == {
        "opd": [],
        "filter": ["filter"],
        "reweight": ["reweight"],
        "fire": ["filter", "reweight"],
    }
    assert all(recipe == left["opd"][1] for _, recipe in left.values())
    assert recipe["run"]["seed"] == 3 and recipe["student"]["checkpoint"].endswith("student_3")


def test_intervals():
    mean, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0 and half == pytest.approx(2.776 * 1.5811388 / 5**0.5, rel=1e-6)
