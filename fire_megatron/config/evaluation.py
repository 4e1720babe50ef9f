"""The recipe's benchmarks."""

from __future__ import annotations

from collections.abc import Iterator

from fire_megatron.config.errors import Problem
from fire_megatron.config.kinds import BenchmarkName, Chance, Count, NonNegative, Samples, Size, Text
from fire_megatron.config.section import Section


class BenchmarkConfig(Section):
    """Problems with right answers. The prompts are made as those of `data`, its chat template and system message."""

    path: Text
    """JSON Lines, or one JSON list, of objects with `problem` and `answer`."""
    name: BenchmarkName | None = None
    """Name in metrics and files; null is the file's name without its ending."""
    samples: Samples = 1
    """Answers to each problem."""
    limit: Count = 0
    """Take this many problems from the start of the file; 0 takes all."""
    max_new_tokens: Size = 1024
    """Longest answer, in tokens; longer ones are cut, which makes most of them wrong."""
    temperature: NonNegative = 1.0
    """Divides the logits before sampling; 0 takes the likeliest token."""
    top_p: Chance = 1.0
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
