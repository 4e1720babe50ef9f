"""The rows of a step, as far as a plan has to know them: how many, how long, whose."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from fire_megatron.config.roles import routes
from fire_megatron.config.schema import Recipe
from fire_megatron.data.records import Prompt
from fire_megatron.data.rollouts import Rollouts, Target, TrainingRows


@dataclass(frozen=True)
class Workload:
    """One step. All rows have the same length."""

    rows: int
    """Answers sampled."""
    prompt_tokens: int
    response_tokens: int
    kept: int
    """Answers that the filter leaves."""
    shares: Mapping[str, float]
    """By teacher, the part of the rows that it scores; rows of several teachers count for each."""

    @property
    def row_tokens(self) -> int:
        """Tokens of a row."""
        return self.prompt_tokens + self.response_tokens

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        *,
        prompt_tokens: int | None = None,
        response_tokens: int | None = None,
        counts: Mapping[str, int] | None = None,
    ) -> Workload:
        """What a recipe asks for.

        Args:
            recipe: as loaded.
            prompt_tokens: of every prompt; None is the longest that the recipe allows.
            response_tokens: of every answer; None is the longest that the recipe allows.
            counts: prompts of each label; None takes as many for each teacher.
        """
        rows = recipe.rollout.prompts_per_step * recipe.rollout.samples_per_prompt
        dropped = sum(h.options.get("percentile", 0.0) for h in recipe.loss.hooks if h.name == "filter")
        names, whole = routes(recipe), sum(counts.values()) if counts else len(recipe.teachers)
        totals = dict.fromkeys(recipe.teachers, 0 if counts else 1)
        for label, count in (counts or {}).items():
            for name in {names[part] for part in label.split("+")}:
                totals[name] += count
        return cls(
            rows=rows,
            prompt_tokens=prompt_tokens or recipe.data.max_prompt_tokens,
            response_tokens=response_tokens or recipe.rollout.max_new_tokens,
            kept=max(1, round(rows * (1 - min(dropped, 100.0) / 100))),
            shares={name: total / whole for name, total in totals.items()},
        )

    def prompts(self, count: int) -> list[Prompt]:
        """So many prompts."""
        return [Prompt(i, "", (0,) * self.prompt_tokens, "") for i in range(count)]

    def training_rows(self, count: int, states: Mapping[str, torch.Tensor] | None = None) -> TrainingRows:
        """So many rows to learn from, of the teachers in turn.

        Args:
            count: rows.
            states: what each teacher has sent of a row; None where the loss needs none.
        """
        zeros = torch.zeros(self.response_tokens)
        rollouts = Rollouts(
            row_ids=tuple(range(count)),
            prompts=tuple(self.prompts(count)),
            responses=(zeros.long(),) * count,
            log_probs=(zeros,) * count,
            entropies=(zeros,) * count,
            truncated=(False,) * count,
            weight_version=0,
        )
        names = list(itertools.islice(self._in_turn(), count))
        return TrainingRows(
            rollouts=rollouts,
            targets=tuple(Target((name,)) for name in names),
            teacher_log_probs=(zeros,) * count,
            weights=(zeros,) * count,
            states=None if states is None else tuple({name: states[name]} for name in names),
        )

    def _in_turn(self) -> Iterator[str]:
        return itertools.cycle([name for name, share in self.shares.items() if share > 0])
