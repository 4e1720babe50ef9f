"""What of a response is judged."""

from types import SimpleNamespace

import pytest

from fire_megatron.data.records import Prompt
from fire_megatron.evaluation.benchmarks import Benchmark, BenchmarkTask, Problem
from fire_megatron.evaluation.runner import BenchmarkRunner
from fire_megatron.rollout.sampling import Sampling

TOKENS = ["<think>", "</think>", r"\boxed{2}", r"\boxed{3}", "so", "<end>"]


@pytest.mark.parametrize(
    ("prompt", "response", "answer"),
    [
        (["so"], [r"\boxed{2}", "<end>"], "2"),
        (["so", "<think>"], [r"\boxed{2}", "<end>"], None),
        (["so", "<think>"], ["so", "</think>", r"\boxed{2}", "<end>"], "2"),
        (["so", "<think>", "</think>"], [r"\boxed{2}", "<end>"], "2"),
        (["so"], [r"\boxed{3}", "so", "<think>", r"\boxed{2}"], "3"),
        (["<think>", *["so"] * 40], [r"\boxed{2}"], "2"),
    ],
)
def test_a_thought_that_the_prompt_begins_is_one(prompt, response, answer):
    ids = {"prompt": tuple(map(TOKENS.index, prompt)), "response": list(map(TOKENS.index, response))}
    task = BenchmarkTask(
        Benchmark("sums", (Problem("sums:1", "1+1?", "2"),), ""),
        [Prompt(0, "sums", ids["prompt"], "1+1?")],
        1,
        Sampling(max_new_tokens=4, stop_ids=frozenset({TOKENS.index("<end>")}), seed=7),
    )
    tokenizer = SimpleNamespace(decode=lambda tokens: " ".join(TOKENS[i] for i in tokens))
    judge = SimpleNamespace(
        equal=lambda right, given: right == given, published_verdict=lambda right, text: right in text
    )
    said = BenchmarkRunner._judged(SimpleNamespace(tokenizer=tokenizer), task, (0, 0), ids["response"], judge)
    assert (said.answer, said.correct) == (answer, answer == "2")
    assert said.math_verify == (r"\boxed{2}" in response)
    assert said.truncated == (response[-1] != "<end>")
