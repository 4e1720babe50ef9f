"""Benchmark files: problems with their right answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fire_megatron.config.data import BenchmarkConfig
from fire_megatron.config.errors import DataError
from fire_megatron.config.kinds import MOST_SAMPLES
from fire_megatron.config.rules.data import benchmark_code, benchmark_name
from fire_megatron.data.encoder import surely_longer
from fire_megatron.data.records import Prompt
from fire_megatron.data.rows import lookup, read_rows, shown
from fire_megatron.rollout.sampling import Sampling

_PROBLEM = ("problem", "question", "query", "prompt")
_ANSWER = ("answer", "final_answer", "expected_answer", "ground_truth", "target")
"""Keys that are tried where none is named."""
_EXAMPLES = 5
"""Wrong rows named one by one before the rest is counted."""
Encode = Callable[[list[dict[str, str]]], list[int] | None]
"""Token ids of a chat, by :class:`fire_megatron.data.encoder.Encoder`."""


@dataclass(frozen=True)
class Problem:
    """One problem."""

    place: str
    """``file:line``."""
    text: str
    answer: str
    """The right answer, as in the file."""


@dataclass(frozen=True)
class Benchmark:
    """The problems of a file."""

    name: str
    """The file's name without its ending, unless another was given; a part of metric and file names."""
    problems: tuple[Problem, ...]
    digest: str
    """Of every problem and answer in the file, whatever the limit."""

    @property
    def code(self) -> int:
        """23 bits of the name."""
        return benchmark_code(self.name)

    def row_id(self, problem: int, sample: int) -> int:
        """What, with the seed, fixes the random numbers of an answer: nothing else of the run does, so more problems or
        more samples leave those that there are as they were."""
        assert problem < 2**24 and sample < MOST_SAMPLES
        return (self.code << 40) | (sample << 24) | problem


@dataclass(frozen=True)
class BenchmarkTask:
    """A benchmark and how it is answered."""

    benchmark: Benchmark
    prompts: Sequence[Prompt]
    """Of its problems."""
    samples: int
    """Answers to each."""
    sampling: Sampling

    @classmethod
    def of(
        cls,
        benchmark: Benchmark,
        config: BenchmarkConfig,
        encode: Encode,
        *,
        positions: int,
        seed: int,
        stop_ids: Sequence[int],
    ) -> BenchmarkTask:
        """As a section of a recipe says.

        Args:
            benchmark: read.
            config: how it is answered.
            encode: makes token ids of a chat.
            positions: of the model, for prompt and answer together.
            seed: of the sampling.
            stop_ids: tokens that end an answer.

        Raises:
            DataError: a problem that is too long or cannot be encoded.
        """
        prompts = encode_problems(benchmark, encode, room=positions - config.max_new_tokens)
        return cls(benchmark, prompts, config.samples, Sampling.of(config, seed=seed, stop_ids=stop_ids))

    @property
    def name(self) -> str:
        """The benchmark's."""
        return self.benchmark.name

    @property
    def longest_row(self) -> int:
        """Tokens of the longest prompt and answer."""
        return max(len(prompt.token_ids) for prompt in self.prompts) + self.sampling.max_new_tokens

    @property
    def keys(self) -> list[tuple[int, int]]:
        """(problem, sample) of every answer, those to one problem together."""
        return [(problem, sample) for problem in range(len(self.prompts)) for sample in range(self.samples)]


def read_benchmark(config: BenchmarkConfig) -> Benchmark:
    """Read a file of problems with their answers, in any format of :func:`read_rows`. The whole file is checked.

    Raises:
        DataError: a file that cannot be read, or rows that are wrong, by file and line.
    """
    path = Path(config.path)
    problems: list[Problem] = []
    wrong: list[str] = []
    for place, row in read_rows(path):
        try:
            problems.append(_problem(place, row, config))
        except DataError as error:
            wrong.append(f"{place}: {error}")
    if wrong:
        rest = [f"... and {len(wrong) - _EXAMPLES} more wrong rows"] if len(wrong) > _EXAMPLES else []
        raise DataError("\n".join([*wrong[:_EXAMPLES], *rest]))
    if not problems:
        raise DataError(f"{path}: holds no problem; give a file with a problem and its answer in each row")
    digest = hashlib.sha256("".join(json.dumps([p.text, p.answer]) + "\n" for p in problems).encode()).hexdigest()
    return Benchmark(config.name or benchmark_name(path), tuple(problems[: config.limit or None]), digest)


def _problem(place: str, row: dict[str, Any] | DataError, config: BenchmarkConfig) -> Problem:
    if isinstance(row, DataError):
        raise row
    key, text = _found(row, config.problem_key, _PROBLEM)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{key!r} is {shown(text)}; write the problem's text there{_other_key(row, 'problem_key')}")
    key, answer = _found(row, config.answer_key, _ANSWER)
    if isinstance(answer, list) and answer and all(isinstance(part, str) for part in answer):
        answer = ", ".join(answer)
    if type(answer) in (int, float):
        answer = json.dumps(answer)
    if not isinstance(answer, str) or not answer.strip():
        advice = f"write the right answer there, as text or a number{_other_key(row, 'answer_key')}"
        raise DataError(f"{key!r} is {shown(answer)}; {advice}")
    return Problem(place, text, answer.rpartition("\n####")[2].strip() or answer)  # GSM8K's come with their derivation


def _found(row: Mapping[str, Any], named: str | None, candidates: Sequence[str]) -> tuple[str, Any]:
    """Key and value: of the key that the user names, or of the first candidate that is there, in any case."""
    if named is not None:
        return named, lookup(row, named)
    keys = {key.lower(): key for key in reversed(row)}
    found = next((keys[key] for key in candidates if row.get(keys.get(key, key)) is not None), candidates[0])
    return found, row.get(found)


def _other_key(row: Mapping[str, Any], option: str) -> str:
    return f", or name its key with {option} (the row has {shown(', '.join(map(str, row)))})" if row else ""


def encode_problems(benchmark: Benchmark, encode: Encode, *, room: int) -> list[Prompt]:
    """Tokenized problems.

    Args:
        benchmark: read.
        encode: makes token ids of a chat.
        room: tokens that a prompt may have beside the longest answer.

    Raises:
        DataError: a problem that is too long or cannot be encoded, by file and line.
    """
    prompts = []
    for index, problem in enumerate(benchmark.problems):
        if surely_longer(len(problem.text), room):
            raise DataError(_too_long(problem, f"{len(problem.text)} characters", room))
        try:
            token_ids = encode([{"role": "user", "content": problem.text}])
        except DataError as error:
            raise DataError(f"{problem.place}: {error}") from error
        assert token_ids is not None, "an encoder that drops prompts"
        if len(token_ids) > room:
            raise DataError(_too_long(problem, f"{len(token_ids)} tokens", room))
        prompts.append(Prompt(index, benchmark.name, tuple(token_ids), problem.text))
    return prompts


def _too_long(problem: Problem, length: str, room: int) -> str:
    return (
        f"{problem.place}: {length}, and the model's positions leave {max(room, 0)} beside the longest answer; lower "
        "--max-new-tokens (max_new_tokens of evaluation.benchmarks)"
    )
