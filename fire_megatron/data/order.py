"""Which prompts a step takes: a pure function of seed and step, so that resuming needs only the step number."""

from __future__ import annotations

import functools

import numpy as np


class PromptOrder:
    """Every prompt once an epoch, each epoch in another order; a step may straddle two epochs."""

    def __init__(self, num_prompts: int, per_step: int, *, seed: int, shuffle: bool) -> None:
        """Args: num_prompts: size of the prompt set, at least 1; per_step: prompts of a step over all ranks."""
        assert num_prompts > 0 and per_step > 0
        self.num_prompts, self.per_step, self.seed, self.shuffle = num_prompts, per_step, seed, shuffle
        self._epoch = functools.lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_prompts)
        # Raw words of the counter-based generator are the same in every numpy; Generator.permutation need not be.
        words = np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64)).random_raw(self.num_prompts)
        return np.argsort(words, kind="stable")

    def batch(self, step: int) -> list[int]:
        """Prompt indices of the 0-based ``step``."""
        places = range(step * self.per_step, (step + 1) * self.per_step)
        return [int(self._epoch(place // self.num_prompts)[place % self.num_prompts]) for place in places]
