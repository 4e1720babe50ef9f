"""The study benchmarks/fire_vs_opd: its checker, and that its arms differ in nothing but the hooks."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from benchmarks.fire_vs_opd.analyse import interval, read_results, table
from benchmarks.fire_vs_opd.controls import drop_random
from benchmarks.fire_vs_opd.dropped import mean_log_probs, shares
from benchmarks.fire_vs_opd.pretrain import VOCABULARY, Training, make_model, make_tokenizer
from benchmarks.fire_vs_opd.study import ARMS, Study
from benchmarks.fire_vs_opd.tasks import DOMAINS, MAX_NEW_TOKENS, is_right, problems
from fire_megatron.config.load import recipe_to_dict
from fire_megatron.config.loss import HookConfig
from fire_megatron.data.tokenizer import load_tokenizer
from fire_megatron.fire.apply import apply_hooks
from fire_megatron.fire.batch import FireBatch
from fire_megatron.fire.hooks import build_hooks
from fire_megatron.parallel.reducer import Reducer


def test_results_worked_out_by_hand():
    assert DOMAINS["math"].result("47+85+36+12=") == "180"
    assert DOMAINS["math"].result("10+11+12+13=") == "046"
    # reversed 25183, its first two swapped 52183, first to the end 21835, ends exchanged 51832, plus one 62943
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


def test_the_control_drops_as_many_rows_as_the_filter():
    rows = FireBatch(
        teacher_B=torch.tensor([0] * 31 + [1] * 33),
        teacher_names=("math", "code"),
        mask_BR=torch.ones(64, 2, dtype=torch.bool),
        teacher_logp_BR=-torch.rand(64, 2, generator=torch.Generator().manual_seed(0)),
        teacher_entropy_BR=torch.ones(64, 2),
        student_entropy_BR=torch.ones(64, 2),
        truncated_B=torch.zeros(64, dtype=torch.bool),
    )
    kept = {}
    for name, hook in {"filter": build_hooks([HookConfig("filter")])[0], "random": drop_random(20.0)}.items():
        selected = apply_hooks(rows, [hook], reducer=Reducer(), micro_batch_size=1).keep_B
        kept[name] = [int(selected[:31].sum()), int(selected[31:].sum())]
    assert kept["filter"] == kept["random"] == [25, 26]


def test_the_control_differs_in_its_hook_and_the_plugin_that_has_it():
    study = Study(Path("out"))
    plain, control = (recipe_to_dict(study.recipe(arm, 3)) for arm in ("opd", "random"))
    assert control["run"]["plugins"] == ["benchmarks.fire_vs_opd.controls"]
    assert [hook["name"] for hook in control["loss"]["hooks"]] == ["drop_random"]
    for recipe in (plain, control):
        for key in ("name", "dir", "plugins"):
            del recipe["run"][key]
        del recipe["loss"]["hooks"]
    assert plain == control


def test_what_the_filter_would_drop():
    model = make_model(Training(("math",), layers=1, hidden=32, steps=1), seed=0)
    rows = [
        {"step": 1, "prompt": "1+2=", "response": "#003", "truncated": False, "reverse_kl": 1.0},
        {"step": 1, "prompt": "10+2=", "response": "3", "truncated": True, "reverse_kl": 3.0},
    ]
    for row, score in zip(rows, mean_log_probs(model, rows).tolist(), strict=True):
        text = row["prompt"] + row["response"]
        ids = [VOCABULARY[c] for c in text] + ([] if row["truncated"] else [VOCABULARY["<eos>"]])
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1).detach()
        response = range(len(row["prompt"]), len(ids))
        assert score == pytest.approx(sum(float(log_probs[t - 1, ids[t]]) for t in response) / len(response), abs=1e-5)
    lowest = rows[int(mean_log_probs(model, rows).argmin())]
    found = shares(model, "math", rows)
    assert found["rows"] == 50.0 and found["kl"] == pytest.approx(100 * lowest["reverse_kl"] / 4)


def test_intervals():
    mean, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0 and half == pytest.approx(2.776 * 1.5811388 / 5**0.5, rel=1e-6)


def _result(arm: str, seed: int, right: float, **changes: object) -> dict[str, object]:
    made = {"arm": arm, "seed": seed, "changes": {}, "first_rollouts": f"a{seed}", "prompts": "b", "rows_sampled": 64}
    accuracy = {label: {"greedy": right, "sampled": right / 2} for label in DOMAINS}
    curves = {"keep_ratio": 1.0, "tokens_sampled": 9, "reverse_kl": {label: [0.5] for label in DOMAINS}}
    return {**made, **curves, "accuracy": accuracy, **changes}


def _write_results(out: Path, results: list[dict[str, object]]) -> None:
    (out / "results").mkdir()
    for i, result in enumerate(results):
        (out / "results" / f"{i}.json").write_text(json.dumps(result))


def test_the_table_compares_seeds_that_are_whole(tmp_path):
    models = [{"model": name, "accuracy": _result("opd", 0, 0.9)["accuracy"]} for name in ("math", "code")]
    models += [{"model": f"student_{seed}", "accuracy": _result("opd", 0, 0.2)["accuracy"]} for seed in range(3)]
    runs = [_result(arm, seed, 0.4 + 0.1 * seed + 0.02 * i) for seed in (0, 1) for i, arm in enumerate(ARMS)]
    pilot = _result("opd", 900, 1.0, changes={"optimizer__lr": 1e-3})
    _write_results(tmp_path, [*models, *runs, _result("opd", 2, 1.0), pilot])
    found, before = read_results(tmp_path)
    assert {seed for _, seed in found} == {0, 1} and set(before) >= {"math", "code", "student_0"}
    lines = table(found, before).splitlines()
    assert "2 seeds" in lines[0]
    plain, filtered = (next(line for line in lines if line.startswith(f"| {name}")) for name in ("plain", "filter"))
    assert plain.startswith("| plain OPD | 45.0 ± 63.5 | 45.0 ± 63.5 | 45.0 ± 63.5 | 22.5 ±")
    assert filtered.startswith("| filter only | 47.0 ±")
    difference = [line for line in lines if line.startswith("| FiRe (both)")][1]
    assert difference.startswith("| FiRe (both) | +6.0 ± 0.0 |"), "paired: what seeds have in common is no error"


@pytest.mark.parametrize("what", ["first_rollouts", "prompts", "rows_sampled"])
def test_arms_that_had_other_rollouts_are_refused(tmp_path, what):
    runs = [_result(arm, 0, 0.5, **({what: 1} if arm == "fire" else {})) for arm in ARMS]
    _write_results(tmp_path, runs)
    with pytest.raises(ValueError, match=what):
        read_results(tmp_path)
