"""Reading benchmark files."""

import pytest

from fire_megatron.config.errors import DataError
from fire_megatron.evaluation.benchmarks import encode_problems, read_benchmark

TWO = '{"problem": "1+1?", "answer": "2"}\n{"problem": "2+2?", "answer": 4}\n'


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
