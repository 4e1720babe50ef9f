"""How answers are sampled: what a call of an engine is told besides the prompts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from fire_megatron.config.data import BenchmarkConfig
from fire_megatron.config.schema import RolloutConfig


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of one generation. With the weights, the step and the rows they fix the samples."""

    max_new_tokens: int
    """Longest answer."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Nucleus mass in (0, 1]."""
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end an answer."""
    batch_size: int = 0
    """Rows that a replica decodes together, 0 for all of its own; changes samples by rounding alone."""

    @classmethod
    def of(cls, config: RolloutConfig | BenchmarkConfig, *, seed: int, stop_ids: Collection[int]) -> Sampling:
        """As a section of the recipe has it."""
        return cls(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=seed,
            stop_ids=frozenset(stop_ids),
            batch_size=config.batch_size,
        )
