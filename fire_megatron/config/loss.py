"""The ``loss`` section of a recipe: estimator, divergence and hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt

from fire_megatron.config.errors import RecipeProblem
from fire_megatron.config.kinds import Count, NonNegative, Positive, Share, Size, Temperature, Text
from fire_megatron.config.section import List, Plain, Section, build, plain


class FilterOptions(Section):
    """Drops the answers that their teacher finds least likely (mean log-probability of the response tokens)."""

    percentile: Annotated[float, Ge(0), Lt(100)] = 20.0
    """Answers that score below this percentile are dropped; 0 keeps all."""
    scope: Literal["global", "microbatch"] = "global"
    """What the percentile is taken over: the step's whole batch, or each micro-batch as the published code does."""
    group_by: Literal["teacher", "batch"] = "teacher"
    """One threshold a teacher, or one for all teachers together."""
    drop_truncated: bool = False
    """Whether answers that were cut at `rollout.max_new_tokens` are dropped as well."""

    def _problems(self) -> Iterator[RecipeProblem]:
        if self.percentile == 0:
            yield from self._idle(("scope", "group_by"), "with percentile 0, which keeps all", "raise percentile")


class ReweightOptions(Section):
    """Puts more weight on tokens where the teacher is sure and the student is not; the mean weight is 1."""

    alpha: NonNegative = 1.0
    """Strength of the teacher's confidence; 0 ignores it."""
    beta: NonNegative = 1.0
    """Strength of the student's confusion; 0 ignores it."""
    scope: Literal["global", "microbatch"] = "global"
    """What maxima and mean are taken over: the step's whole batch, or each micro-batch as the published code does."""
    group_by: Literal["teacher", "batch"] = "teacher"
    """One entropy maximum a teacher, or one for all teachers together."""
    normalise_over: Literal["kept", "all"] = "kept"
    """Tokens whose mean weight is 1: those of kept answers, or all, as in the published code."""

    def _problems(self) -> Iterator[RecipeProblem]:
        if self.alpha == self.beta == 0:
            keys = ("scope", "group_by", "normalise_over")
            yield from self._idle(keys, "with alpha and beta 0, where every weight is 1", "raise one of them")


BUILTIN_HOOKS: Mapping[str, type[Section]] = {"filter": FilterOptions, "reweight": ReweightOptions}
"""Hooks that come with the package, with the class of their options."""


class HookConfig(Section, extra="allow"):
    """A loss hook, written as one mapping: `{name: filter, percentile: 30}`."""

    __pydantic_extra__: dict[str, Plain]
    variants = BUILTIN_HOOKS
    name: Text
    """`filter`, `reweight`, or a name that a module of `run.plugins` registers."""

    @property
    def options(self) -> dict[str, Any]:
        """The hook's own options; those of a built-in hook are complete, defaults included."""
        return self.__pydantic_extra__

    def model_post_init(self, _: Any) -> None:
        """Checks the options of a built-in hook."""
        if self.name in BUILTIN_HOOKS:
            object.__setattr__(self, "__pydantic_extra__", plain(build(BUILTIN_HOOKS[self.name], self.options)))


class ImportanceConfig(Section):
    """Corrects for the rollout engine's log-probabilities differing from the trainer's."""

    mode: Literal["truncate", "mask", "off"] = "truncate"
    """`truncate` caps the weight p_trainer / p_engine of a token at `high`, `mask` drops tokens whose weight is
    outside `low`..`high`, `off` does neither. The fraction affected is a metric."""
    low: NonNegative = 0.0
    """Smallest weight that `mask` keeps."""
    high: Positive = 2.0
    """Largest weight."""

    def _problems(self) -> Iterator[RecipeProblem]:
        if self.mode != "mask":
            yield from self._idle(("low",), f"with mode {self.mode}", "use mask")
        if self.mode == "off":
            yield from self._idle(("high",), "with mode off", "use truncate or mask")
        if self.mode == "mask" and self.low >= self.high:
            yield RecipeProblem("low", f"{self.low} is not below high, which is {self.high}; lower it or raise high")


class LossConfig(Section):
    """What is minimised."""

    estimator: Literal["sampled", "full", "topk"] = "sampled"
    """`sampled` is the clipped policy gradient of the reverse KL on the sampled tokens; `full` the exact `divergence`
    over the whole vocabulary, for which teachers send their final hidden states; `topk` the divergence on the
    teacher's `top_k` likeliest tokens and one bucket for all others."""
    divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon", "skewed_forward_kl", "skewed_reverse_kl"] = (
        "reverse_kl"
    )
    """What `full` and `topk` minimise; docs/losses.md has the formulas."""
    beta: Share = 0.5
    """Weight of the teacher in the mixture of `jensen_shannon`."""
    skew: Share = 0.1
    """How much of its first argument a skewed KL mixes into its second."""
    top_k: Size = 64
    """Tokens that a teacher sends for `topk`."""
    temperature: Temperature = 1.0
    """Divides the logits of student and teachers wherever a step takes log-probabilities: in the loss, in the filter
    and in the reverse KL that is reported. With `sampled` it should be `rollout.temperature`, so that the answers are
    samples of the distribution that is trained. Entropies, and so the weights of `reweight`, are those of
    temperature 1."""
    student_temperature: Temperature | None = None
    """Divides the student's logits in the divergence of `full` and `topk`; null is `temperature`."""
    teacher_temperature: Temperature | None = None
    """Divides the teachers' logits in the divergence of `full` and `topk`; null is `temperature`."""
    mixture: Literal["distributions", "log_probs"] = "distributions"
    """What the weights mix where a row names several teachers: their distributions, or their log-probabilities."""
    chunk_tokens: Count = 0
    """Tokens whose logits exist at a time in the loss; 0 picks a number for the device. Lower it when the update runs
    out of memory."""
    clip: Positive = 0.2
    """In `sampled`, the ratio of new to old probabilities is clipped to 1 - clip .. 1 + clip: from the second of
    `optimizer.mini_batches` on."""
    importance: ImportanceConfig = ImportanceConfig()
    """Correction between rollout engine and trainer, in `sampled`."""
    hooks: List[HookConfig] = (HookConfig("filter"), HookConfig("reweight"))
    """Applied in this order to each step's scored answers; `[]` is plain on-policy distillation."""

    @property
    def temperatures(self) -> tuple[float, float]:
        """The student's and the teachers', in the divergence."""
        student, teacher = self.student_temperature, self.teacher_temperature
        return (self.temperature if student is None else student, self.temperature if teacher is None else teacher)

    def _problems(self) -> Iterator[RecipeProblem]:
        dense = ("full", "topk")
        read_by: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
            "divergence": (dense, ()),
            "beta": (dense, ("jensen_shannon",)),
            "skew": (dense, ("skewed_forward_kl", "skewed_reverse_kl")),
            "top_k": (("topk",), ()),
            "student_temperature": (dense, ()),
            "teacher_temperature": (dense, ()),
            "mixture": (("sampled", "full"), ()),
            "clip": (("sampled",), ()),
            "importance": (("sampled",), ()),
        }
        for key, (estimators, divergences) in read_by.items():
            if "temperature" in key and getattr(self, key) == self.temperature:  # the same, written out
                continue
            if self.estimator not in estimators:
                yield from self._idle((key,), f"with estimator {self.estimator}", f"use {' or '.join(estimators)}")
            elif divergences and self.divergence not in divergences:
                yield from self._idle((key,), f"with divergence {self.divergence}", f"use {' or '.join(divergences)}")
