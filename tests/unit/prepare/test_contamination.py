"""Problems of benchmarks, in rows of every disguise."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fire_megatron.config.errors import DataError
from fire_megatron.prepare.contamination import BenchmarkProblems
from fire_megatron.prepare.same_text import plain

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
LONG = (
    "A farmer has 17 goats and 23 sheep. Each goat gives $\\frac{3}{2}$ litres of milk a day, and each sheep gives "
    "half as much as a goat does. How many litres of milk does the farmer have after 5 days?"
)
SHORT = "What is $2+3$?"
MIDDLE = "Find the sum of all integers from one to ninety."


@pytest.fixture
def benchmarks(tmp_path):
    """``benchmarks(problems, overlap=...)`` of one file, bench.jsonl."""

    def make(*problems: str, **options) -> BenchmarkProblems:
        path = tmp_path / "bench.jsonl"
        path.write_text("".join(json.dumps({"problem": problem}) + "\n" for problem in problems))
        return BenchmarkProblems([path], **options)

    return make


def _find(held: BenchmarkProblems, *texts: str) -> tuple[int, float] | None:
    """Line and share."""
    match = held.find([plain(text) for text in texts])
    return match and (int(match.where.rsplit(":", 1)[1]), match.share)


@pytest.mark.parametrize(
    "row",
    [
        LONG,
        LONG + BOXED,
        LONG.upper().replace("$", "").replace(" ", "\n "),
        LONG.replace("\\frac", "\\dfrac").replace("$\\", "\\( \\").replace("}$", "} \\)"),
        f"You are a tutor. Read this. {LONG} Show all of your work, then check it twice.",
    ],
    ids=["itself", "with instruction", "typed otherwise", "other LaTeX", "embedded"],
)
def test_a_problem_is_found(benchmarks, row):
    assert _find(benchmarks(SHORT, LONG + BOXED), row) == (2, 1.0)


def test_the_problem_that_most_is_had_of_is_named(benchmarks):
    other = LONG.replace("How many litres of milk does the farmer have after 5 days?", "Why is that so?")
    assert _find(benchmarks(LONG, other), f"Read this. {other} Explain.") == (2, 1.0)
    assert str(benchmarks(LONG, other).find([plain(other)])).endswith("bench.jsonl:2")


def test_any_message_may_hold_it(benchmarks):
    assert _find(benchmarks(LONG), "Be brief.", LONG, "Thanks.") == (1, 1.0)


def test_one_number_changed_in_a_long_problem_is_the_same_problem(benchmarks):
    line, share = _find(benchmarks(LONG), LONG.replace("23 sheep", "29 sheep"))
    assert line == 1 and 0.7 <= share < 1
    assert _find(benchmarks(LONG, overlap=1.0), LONG.replace("23 sheep", "29 sheep")) is None
    assert _find(benchmarks(LONG, overlap=1.0), LONG) == (1, 1.0)


def test_one_word_changed_in_a_short_problem_is_another(benchmarks):
    held = benchmarks(SHORT, MIDDLE)
    assert _find(held, "What is $2+4$?") is None and _find(held, MIDDLE.replace("integers", "primes")) is None
    assert _find(held, MIDDLE.replace(".", " ,") + BOXED) == (2, 1.0)


def test_a_problem_of_few_words_is_compared_whole(benchmarks):
    held = benchmarks(SHORT)
    assert _find(held, "what is 2 + 3 ?" + BOXED) == (1, 1.0)
    assert _find(held, "Tell me what is $2+3$? And what is 7 times 8, and why do you think so?") is None
    assert _find(held, "What is $2-3$?") is None, "signs count where the whole is compared"


def test_common_phrases_are_no_contamination(benchmarks):
    ending = "can be written as $\\frac{m}{n}$ where $m$ and $n$ are relatively prime positive integers. Find $m+n$."
    held = benchmarks(f"The probability that a random walk on the edges of a cube returns to its start in six {ending}")
    assert _find(held, f"The area of the smallest circle around three unit squares set in a row {ending}") is None


def test_an_instruction_of_the_benchmark_is_nobodys_own(benchmarks):
    """One that is not among the known: most of each problem's words, yet no row is refused for it."""
    rule = (
        "You are sitting an examination. Answer with one number between zero and nine hundred ninety nine, and not one "
        "word more than that, since a machine is going to read what you have written and compare it with the key."
    )
    problems = [f"{rule} {thing} is mine. How many {thing} fit in the {thing} box of his?" for thing in "abcdefghijkl"]
    held = benchmarks(*problems)
    assert _find(held, f"{rule} Who was the first king of the old realm?") is None
    assert _find(held, f"{BOXED} c is mine. How many c fit in the c box of his? {rule}") == (3, 1.0)


def test_rows_that_cannot_be_read_are_not_passed_over(tmp_path):
    path = tmp_path / "b.jsonl"
    for content, message in (
        (
            '{"problem": "two"}\n{"problem": ""}\n',
            r"b\.jsonl:2: a benchmark's problem cannot be read: 'problem' is empty",
        ),
        ('{"problem": "two"}\n{oops\n', r"b\.jsonl:2: a benchmark's problem cannot be read: not valid JSON"),
        ('{"text": "two"}\n', r"no prompt under any of problem, .*keys are text; name the key with --benchmark-key"),
        ("", "no problem in this benchmark"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            BenchmarkProblems([path])
    path.write_text('{"task": {"text": "two"}}\n')
    assert len(BenchmarkProblems([path], key="task.text")) == 1
    with pytest.raises(DataError, match=re.escape("--benchmark-key task.txt: none of the first 1 rows has it")):
        BenchmarkProblems([path], key="task.txt")


def test_a_benchmark_of_chats(tmp_path):
    path = tmp_path / "chats.json"
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": LONG}]
    path.write_text(json.dumps([{"prompt": chat}]))
    match = BenchmarkProblems([path]).find([plain(LONG)])
    assert match and match.where == f"{path}: entry 1"


def test_files_are_told_apart(tmp_path):
    paths = []
    for name, problem in (("a", LONG), ("b", MIDDLE)):
        paths.append(Path(tmp_path / f"{name}.jsonl"))
        paths[-1].write_text(json.dumps({"question": problem}))
    held = BenchmarkProblems(paths)
    assert (len(held), held.count(0), held.count(1)) == (2, 1, 1)
    assert held.find([plain(MIDDLE)]).benchmark == 1
