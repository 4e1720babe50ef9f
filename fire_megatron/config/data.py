"""Sections of a recipe about what is read: prompts, held-out prompts, benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from fire_megatron.config import kinds
from fire_megatron.config.errors import RecipeProblem
from fire_megatron.config.kinds import Count, LongSeed, Mass, NonNegative, Size, Text
from fire_megatron.config.section import FilledList, List, Options, Plain, Section


class SourceConfig(Section):
    """A file of prompts."""

    path: Text
    """JSON Lines, a JSON list, CSV or Parquet (which needs pyarrow), a prompt a row."""
    label: Text | None = None
    """Label of every prompt in the file; null reads it from `data.label_key` of each row."""
    limit: Count = 0
    """Take this many rows from the start of the file; 0 takes all."""


class DataConfig(Section):
    """The prompts."""

    train: FilledList[SourceConfig]
    """Files of prompts to train on."""
    prompt_key: Text = "problem"
    """Key of a row's prompt text; a dotted path reaches into nested objects."""
    messages_key: Text = "messages"
    """Key of a row's chat messages (a list of `role` and `content`), read when there is no prompt text."""
    label_key: Text = "label"
    """Key of a row's teacher label; a dotted path such as `extra_info.opd_teacher` reaches into nested objects. The
    value is a label, or an object of several with weights, such as `{"math": 3, "code": 1}`."""
    chat_template: Literal["auto", "on", "off"] = "auto"
    """Whether prompts go through the tokenizer's chat template; `auto` uses it when the tokenizer has one."""
    system_prompt: str | None = None
    """System message put before every prompt; needs a chat template."""
    chat_template_kwargs: Options = {}  # noqa: RUF012 - each section gets its own
    """Variables that the chat template reads, such as `{enable_thinking: false}` of Qwen3's."""
    max_prompt_tokens: Size = 1024
    """Longest prompt, in tokens."""
    too_long: Literal["error", "drop"] = "drop"
    """What to do with longer prompts; dropped ones are counted and reported."""
    shuffle: bool = True
    """Whether each pass over the prompts has an order of its own."""


class BenchmarkConfig(Section):
    """Problems with right answers. The prompts are made as those of `data`, its chat template and system message."""

    path: Text
    """JSON Lines, a JSON list, CSV or Parquet of problems with their right answers."""
    problem_key: Text | None = None
    """Key of a problem's text; null takes `problem`, `question`, `query` or `prompt`, in any case. A dotted path
    reaches into nested objects."""
    answer_key: Text | None = None
    """Key of the right answer; null takes `answer`, `final_answer`, `expected_answer`, `ground_truth` or `target`."""
    name: Annotated[str, kinds.BENCHMARK_NAME] | None = None
    """Name in metrics and files; null is the file's name without its ending."""
    samples: kinds.Samples = 1
    """Answers to each problem."""
    limit: Count = 0
    """Take this many problems from the start of the file; 0 takes all."""
    max_new_tokens: Size = 1024
    """Longest answer, in tokens; longer ones are cut, which makes most of them wrong."""
    temperature: NonNegative = 1.0
    """Divides the logits before sampling; 0 takes the likeliest token."""
    top_p: Mass = 1.0
    """Sample from the likeliest tokens that together have this probability; 1 samples from all."""
    batch_size: Count = 0
    """Answers that a data-parallel replica decodes together; 0 decodes all of its own at once. Where there are more, an
    answer that ends makes room for the next."""

    def _problems(self) -> Iterator[RecipeProblem]:
        if self.temperature == 0:
            yield from self._idle(("top_p",), "at temperature 0, which takes the likeliest token", "raise temperature")
        if self.temperature == 0 and self.samples > 1:
            yield RecipeProblem(
                "samples",
                f"{self.samples}, but at temperature 0 they are all the same; leave it out, or raise temperature",
            )


class EvaluationConfig(Section):
    """Reverse KL to each teacher on fixed held-out prompts, and answers to benchmarks."""

    every: Count = 0
    """Evaluate after every so many steps; 0 leaves it at start and end."""
    benchmarks: List[BenchmarkConfig] = ()
    """Benchmarks that the student answers: docs/evaluation.md."""
    chat_template_kwargs: dict[str, Plain] | None = None
    """Variables of the chat template in benchmarks and held-out prompts, in place of `data`'s; null takes those."""
    prompts: List[SourceConfig] = ()
    """Files of held-out prompts for the reverse KL; with none it is not measured."""
    num_prompts: Count = 0
    """Prompts of each label, from the start; 0 takes all."""
    max_new_tokens: Size = 64
    """Longest answer to a held-out prompt, in tokens."""
    at_start: bool = True
    """Whether to evaluate before the first step."""
    at_end: bool = True
    """Whether to evaluate after the last step."""
    seed: LongSeed = 7
    """Seeds the sampling, in the same way at every evaluation."""

    def _problems(self) -> Iterator[RecipeProblem]:
        if (self.prompts or self.benchmarks) and not (self.every or self.at_start or self.at_end):
            yield RecipeProblem("every", "0, but at_start and at_end are false, so nothing is evaluated; raise it")
        if not self.prompts:
            yield from self._idle(("num_prompts", "max_new_tokens"), "without prompts", "give prompts")
        if not self.prompts and not self.benchmarks:
            keys = ("every", "at_start", "at_end", "seed", "chat_template_kwargs")
            yield from self._idle(keys, "without prompts or benchmarks", "give some")
        elif not self.prompts and all(benchmark.temperature == 0 for benchmark in self.benchmarks):
            yield from self._idle(("seed",), "where every benchmark has temperature 0", "raise one")
