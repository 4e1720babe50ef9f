"""The recipe's benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from fire_megatron.config.errors import Problem
from fire_megatron.config.kinds import Count, NonNegative, Size, Text
from fire_megatron.config.section import Match, Range, Section

NAME = Match(r"[A-Za-z0-9][A-Za-z0-9._-]*", "letters, digits, ., - and _ (it becomes a part of metric and file names)")


@dataclass(frozen=True)
class BenchmarkConfig(Section):
    """Problems with right answers. The prompts are made as those of `data`, its chat template and system message."""

    path: Text
    """JSON Lines, or one JSON list, of objects with `problem` and `answer`."""
    name: Annotated[str, NAME] | None = None
    """Name in metrics and files; null is the file's name without its ending."""
    samples: Annotated[int, Range(at_least=1, below=2**16)] = 1
    """Answers to each problem."""
    limit: Count = 0
    """Take this many problems from the start of the file; 0 takes all."""
    max_new_tokens: Size = 1024
    """Longest answer, in tokens; longer ones are cut, which makes most of them wrong."""
    temperature: NonNegative = 1.0
    """Divides the logits before sampling; 0 takes the likeliest token."""
    top_p: Annotated[float, Range(above=0, at_most=1)] = 1.0
    """Sample from the likeliest tokens that together have this probability; 1 samples from all."""
    batch_size: Count = 0
    """Answers that a data-parallel replica decodes together; 0 decodes all of its own at once. Where there are more, an
    answer that ends makes room for the next."""

    def _problems(self) -> Iterator[Problem]:
        if self.temperature == 0 and self.samples > 1:
            yield Problem(
                "samples",
                f"{self.samples}, but at temperature 0 they are all the same; leave it out, or raise temperature",
            )
