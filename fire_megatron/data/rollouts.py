"""The records that a step hands from stage to stage. Each checks its own lengths; none is ever changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fire_megatron.data.records import Prompt


@dataclass(frozen=True)
class Rollouts:
    """Sampled answers, one a row. B rows; R_i response tokens of row i, a stop token among them."""

    row_ids: tuple[int, ...]
    """[B] place of each row in the step's global batch; the same in every layout."""
    prompts: tuple[Prompt, ...]
    """[B]"""
    responses: tuple[torch.Tensor, ...]
    """[R_i] int64 on CPU, without the stop token's successors; a stop token that was sampled is included."""
    log_probs: tuple[torch.Tensor, ...]
    """[R_i] float32, log-probability with which the engine sampled each token."""
    entropies: tuple[torch.Tensor, ...]
    """[R_i] float32, nats, entropy of the student's full next-token distribution at temperature 1."""
    truncated: tuple[bool, ...]
    """[B] whether the row ended at ``max_new_tokens`` instead of a stop token."""
    weight_version: int
    """Steps whose updates were in the weights that sampled these rows."""

    def __post_init__(self) -> None:
        rows = len(self.row_ids)
        columns = (self.prompts, self.responses, self.log_probs, self.entropies, self.truncated)
        assert all(len(column) == rows for column in columns), [len(c) for c in columns]
        for response, log_prob, entropy in zip(self.responses, self.log_probs, self.entropies, strict=True):
            assert response.shape == log_prob.shape == entropy.shape

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def prompt_tokens(self) -> tuple[torch.Tensor, ...]:
        """[P_i] int64 token ids of each row's prompt."""
        return tuple(torch.tensor(prompt.token_ids, dtype=torch.int64) for prompt in self.prompts)

    @property
    def lengths(self) -> tuple[int, ...]:
        """[B] tokens of prompt and response together."""
        return tuple(len(p.token_ids) + len(r) for p, r in zip(self.prompts, self.responses, strict=True))

    def take(self, rows: Sequence[int]) -> Rollouts:
        """The rows at these indices, in this order."""
        return Rollouts(
            row_ids=tuple(self.row_ids[i] for i in rows),
            prompts=tuple(self.prompts[i] for i in rows),
            responses=tuple(self.responses[i] for i in rows),
            log_probs=tuple(self.log_probs[i] for i in rows),
            entropies=tuple(self.entropies[i] for i in rows),
            truncated=tuple(self.truncated[i] for i in rows),
            weight_version=self.weight_version,
        )


@dataclass(frozen=True, order=True)
class Target:
    """Whom a row learns from: one teacher, or several with weights that sum to 1."""

    teachers: tuple[str, ...]
    """Names, sorted."""
    weights: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        assert len(self.teachers) == len(self.weights) and self.teachers == tuple(sorted(set(self.teachers)))

    @property
    def name(self) -> str:
        """The teacher's name, or those of a mixture joined by ``+``: what statistics are kept by."""
        return self.join(self.teachers)

    @staticmethod
    def join(teachers: Sequence[str]) -> str:
        """The name of these teachers together; a teacher's own name has no ``+``."""
        return "+".join(teachers)


@dataclass(frozen=True)
class KeptStates:
    """What a teacher keeps of the rows it has scored, for the ranks that will train on them."""

    holder: Mapping[int, int]
    """Row id -> the teacher's replica that scored the row; the same on every rank."""
    slices: Mapping[int, Mapping[int, torch.Tensor]]
    """Row id -> the student's tensor rank -> [R_i, c] on CPU, in memory that the teacher lends for the step: the
    columns of the row's states that this rank sends to it."""


@dataclass(frozen=True)
class Scores:
    """What the teachers say of the rollouts, in the rollouts' order."""

    targets: tuple[Target, ...]
    """[B] whom each row learns from."""
    log_probs: tuple[torch.Tensor, ...]
    """[R_i] float32, the target's log-probability of each response token."""
    entropies: tuple[torch.Tensor, ...]
    """[R_i] float32, nats, entropy of the teacher's full next-token distribution; of a mixture, the weighted mean."""
    kept: Mapping[str, KeptStates] = field(default_factory=dict)
    """By teacher, where the loss needs more than log-probabilities."""

    def __post_init__(self) -> None:
        assert len(self.targets) == len(self.log_probs) == len(self.entropies)

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def teachers(self) -> tuple[str, ...]:
        """[B] name of each row's target."""
        return tuple(target.name for target in self.targets)


@dataclass(frozen=True)
class TrainingRows:
    """Rows that survived the filter, with everything that the update needs."""

    rollouts: Rollouts
    targets: tuple[Target, ...]
    teacher_log_probs: tuple[torch.Tensor, ...]
    """[R_i] float32."""
    weights: tuple[torch.Tensor, ...]
    """[R_i] float32, token weights; their mean over the global batch's kept tokens is 1 with FiRe's defaults."""
    states: tuple[Mapping[str, torch.Tensor], ...] | None = None
    """[B] what each of the row's teachers sent for its response tokens, [R_i, W] by teacher: this tensor-parallel
    rank's share of the columns on the host, on the ranks that need them, until the next update's are brought; None
    where the loss needs none."""

    def __post_init__(self) -> None:
        assert len(self.rollouts) == len(self.targets) == len(self.teacher_log_probs) == len(self.weights)
        assert self.states is None or len(self.states) == len(self.rollouts)
        for response, teacher, weight in zip(
            self.rollouts.responses, self.teacher_log_probs, self.weights, strict=True
        ):
            assert response.shape == teacher.shape == weight.shape

    def __len__(self) -> int:
        return len(self.rollouts)

    def take(self, rows: Sequence[int]) -> TrainingRows:
        """The rows at these indices, in this order."""
        return TrainingRows(
            rollouts=self.rollouts.take(rows),
            targets=tuple(self.targets[i] for i in rows),
            teacher_log_probs=tuple(self.teacher_log_probs[i] for i in rows),
            weights=tuple(self.weights[i] for i in rows),
            states=None if self.states is None else tuple(self.states[i] for i in rows),
        )
