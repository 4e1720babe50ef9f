"""Reverse KL to each teacher on fixed held-out prompts, from samples that the student draws with fixed numbers.

The estimate is the mean over sampled tokens of log p_S - log p_T, which is unbiased for the reverse KL along the
student's own trajectories. The same random numbers serve every measurement, so that before and after differ by
the weights alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from fire_megatron.data.records import Prompt
from fire_megatron.metrics.table import ruled
from fire_megatron.metrics.values import Mean, Value
from fire_megatron.parallel.grid import ModelGrid
from fire_megatron.rollout.engine import MegatronEngine, Progress
from fire_megatron.rollout.sampling import Sampling
from fire_megatron.teachers.router import TeacherRouter


class HeldOut:
    """Measures the student on the same prompts each time."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        engine: MegatronEngine,
        sampling: Sampling,
        router: TeacherRouter,
        grid: ModelGrid,
    ) -> None:
        """Args: prompts: the fixed prompts; sampling: with the evaluation's own seed and length, at temperature 1."""
        self.prompts, self.engine, self.sampling, self.router, self.grid = list(prompts), engine, sampling, router, grid

    @property
    def own_rows(self) -> int:
        """Answers that this replica samples."""
        return len(self.grid.own_rows(len(self.prompts)))

    def likeliest_answer(self) -> list[int]:
        """Token ids of the answer to the first prompt that takes the likeliest token each time, for people to read;
        on ranks of the replica that has this prompt, nothing on others. Collective over the student's grid."""
        mine = [row for row in self.grid.own_rows(len(self.prompts)) if row == 0]
        prompts, sampling = [self.prompts[row] for row in mine], replace(self.sampling, temperature=0.0)
        rollouts = self.engine.generate(prompts, mine, sampling=sampling, step=0)
        return [token for response in rollouts.responses for token in response.tolist()]

    def measure(
        self, progress: Progress | None = None, sampled: Callable[[], object] = lambda: None
    ) -> dict[str, Value]:
        """``eval/<teacher>/{reverse_kl,mean_length}`` of this replica's rows, to be reduced.

        Args:
            progress: told of sampled tokens.
            sampled: called when this replica has sampled its rows, before the ranks continue together.
        """
        mine = self.grid.own_rows(len(self.prompts))
        prompts = [self.prompts[i] for i in mine]
        scoring = self.router.open(prompts, mine, total=len(self.prompts))
        rollouts = self.engine.generate(
            prompts,
            mine,
            sampling=self.sampling,
            step=0,
            progress=progress,
            finished=scoring.send,
            group_size=scoring.group_size,
        )
        sampled()
        scores = scoring.finish(rollouts)
        totals: dict[str, list[float]] = {}
        for teacher, student, scored in zip(scores.teachers, rollouts.log_probs, scores.log_probs, strict=True):
            sums = totals.setdefault(teacher, [0.0, 0.0, 0.0])
            sums[0] += float((student - scored).sum())
            sums[1] += len(scored)
            sums[2] += 1
        metrics: dict[str, Value] = {}
        for teacher, (kl, tokens, rows) in totals.items():
            metrics[f"eval/{teacher}/reverse_kl"] = Mean(kl, tokens)
            metrics[f"eval/{teacher}/mean_length"] = Mean(tokens, rows)
        return metrics


def format_table(before: dict[str, float], after: dict[str, float], targets: Sequence[str]) -> str:
    """The table that a run ends with: reverse KL per teacher before and after, on the held-out prompts.

    ``targets``: name of each prompt's target.
    """
    rows = [("teacher", "held-out prompts", "reverse KL before", "after", "change")]
    for key in sorted(k for k in after if k.endswith("/reverse_kl")):
        teacher = key.split("/")[1]
        count = targets.count(teacher)
        change = 100 * (after[key] / before[key] - 1) if before.get(key) else float("nan")
        first = f"{before[key]:.4f}" if key in before else "-"
        rows.append((teacher, str(count), first, f"{after[key]:.4f}", f"{change:+.1f}%"))
    return ruled(rows)
