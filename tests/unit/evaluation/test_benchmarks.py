"""Reading benchmark files."""

import json

import pytest

from fire_megatron.config.data import BenchmarkConfig
from fire_megatron.config.errors import DataError
from fire_megatron.evaluation import benchmarks
from fire_megatron.evaluation.benchmarks import encode_problems

TWO = '{"problem": "1+1?", "answer": "2"}\n{"problem": "2+2?", "answer": 4}\n'


def read_benchmark(path, **settings):
    return benchmarks.read_benchmark(BenchmarkConfig(path=str(path), **settings))


def test_read(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text(TWO)
    read = read_benchmark(path)
    assert (read.name, [p.answer for p in read.problems]) == ("sums", ["2", "4"])
    limited = read_benchmark(path, name="one", limit=1)
    assert (limited.name, len(limited.problems), limited.digest) == ("one", 1, read.digest)
    path.write_text(TWO.replace("4", "5"))
    assert read_benchmark(path).digest != read.digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"problem": "1+1?"}\n', r"sums\.jsonl:1: 'answer' is None"),
        (TWO + '{"answer": "2"}\n', r"sums\.jsonl:3: 'problem' is None"),
        ('{"problem": "x", "answer": " "}\n', "'answer' is ' '; write the right answer"),
        ('{"problem": "x", "answer": true}\n', "'answer' is True"),
        ('{"problem": ["x"], "answer": "1"}\n', r"'problem' is \['x'\]"),
        ("{\n", r"sums\.jsonl:1: not valid JSON"),
        ("[1]\n", "is not a JSON object"),
        ("", "holds no problem"),
        ('{"problem": "x"}\n' * 8, r"sums\.jsonl:5: .*\n.*and 3 more wrong rows"),
    ],
)
def test_wrong_rows_are_named(tmp_path, text, message):
    path = tmp_path / "sums.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_benchmark(path)


def test_problems_that_are_too_long_are_named(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text(TWO)
    benchmark = read_benchmark(path)
    prompts = encode_problems(benchmark, lambda chat: [len(chat[0]["content"])], room=1)
    assert [prompt.token_ids for prompt in prompts] == [(4,), (4,)]
    with pytest.raises(DataError, match=r"sums\.jsonl:1: 2 tokens, and the model's positions leave 1 beside"):
        encode_problems(benchmark, lambda chat: [1, 2], room=1)


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"Problem": "1+1?", "Answer": 2, "Solution": "count"}, "2"),
        ({"question": "1+1?", "final_answer": ["2"]}, "2"),
        ({"question": "1+1?", "final_answer": ["1", "2"], "answer": None}, "1, 2"),
        ({"prompt": "1+1?", "expected_answer": "2"}, "2"),
        ({"problem": "1+1?", "question": "2+2?", "answer": "2"}, "2"),
        ({"question": "1+1?", "answer": "one and one\nmake <<1+1=2>>2\n#### 2"}, "2"),
    ],
)
def test_keys_that_benchmarks_have(tmp_path, row, answer):
    path = tmp_path / "sums.jsonl"
    path.write_text(json.dumps(row))
    (problem,) = read_benchmark(path).problems
    assert (problem.text, problem.answer) == ("1+1?", answer)


def test_keys_that_are_named(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text(json.dumps({"body": {"text": "1+1?"}, "problem": "other", "solution": "2", "answer": "3"}))
    (problem,) = read_benchmark(path, problem_key="body.text", answer_key="solution").problems
    assert (problem.text, problem.answer) == ("1+1?", "2")
    path.write_text(json.dumps({"task": "1+1?", "result": "2"}))
    with pytest.raises(
        DataError, match=r"'problem' is None.*name its key with problem_key \(the row has 'task, result'"
    ):
        read_benchmark(path)
    with pytest.raises(DataError, match=r"'answer' is None.*answer_key \(the row has 'task, result'"):
        read_benchmark(path, problem_key="task")


def test_a_csv_file_is_a_benchmark(tmp_path):
    path = tmp_path / "sums.csv"
    path.write_text('problem,answer\n"1+1, please?",2\n2+2?,4\n')
    assert [(p.text, p.answer, p.place) for p in read_benchmark(path).problems] == [
        ("1+1, please?", "2", f"{path}:2"), ("2+2?", "4", f"{path}:3"),
    ]  # fmt: skip
    assert read_benchmark(path).name == "sums"


def test_megabytes_are_not_tokenized(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text(json.dumps({"problem": "1" * 3_000_000, "answer": "2"}))
    with pytest.raises(DataError, match=r"sums\.jsonl:1: 3000000 characters, and the model's positions leave 4096"):
        encode_problems(read_benchmark(path), lambda chat: pytest.fail("tokenized"), room=4096)
