"""What a plan says of one rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fire_megatron.plan.trace import Collective, Trace


@dataclass(frozen=True)
class RoleMemory:
    """What a role holds from step to step on a rank, in bytes."""

    parameters: int
    """Number of parameters."""
    weights: int
    gradients: int = 0
    optimizer: int = 0
    heads: int = 0
    """The teachers' output weights, for the exact divergence."""
    fp8_copies: int = 0
    """Of the weights, while the role computes: by rows and by columns where weights are not FP8 themselves."""
    key: str = ""
    """Equal for roles that share a model."""

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.heads


@dataclass(frozen=True)
class Decode:
    """What bounds sampling."""

    operators: int
    """Of a decode step of all slots, each a kernel or so."""
    flops: int
    """Of a decode step."""
    graphs: bool
    """Whether a decode step is a CUDA graph."""
    prompt_operators: int = 0
    """Of all passes of prompts."""
    prompt_flops: int = 0


@dataclass(frozen=True)
class Phase:
    """A phase of a step on a rank."""

    trace: Trace
    """Of the whole phase; its peak is above what lasts, the key/value cache included."""
    pieces: int
    """Decode steps or micro-batches."""
    rows: int = 0
    """Of this rank's replica."""
    kv_cache: int = 0
    """Bytes of keys and values."""
    kept: int = 0
    """What of sampling's memory stays from step to step: keys and values, and what CUDA graphs work in."""
    decode: Decode | None = None
    """Of sampling alone."""
    loss: int = 0
    """Bytes of the loss on the last stage: a chunk's logits and the gradients of hidden states and output weight."""


@dataclass(frozen=True)
class RankPlan:
    """What a rank needs and does."""

    rank: int
    roles: Mapping[str, RoleMemory]
    """By recipe path, those that the rank holds."""
    phases: Mapping[str, Phase]
    """``sampling``, ``scoring <teacher>``, ``exchange``, ``update``: those that the rank takes part in, in order."""
    scratch: int
    """Bytes of buffers that the first use leaves behind."""
    groups: Mapping[str, Mapping[tuple[int, ...], str]]
    """By recipe path: what the role's groups of ranks are for, by their ranks."""

    @property
    def communicators(self) -> int:
        """Groups of several ranks that this rank sends or receives in, each of them with buffers of its own."""
        used = {c.ranks for phase in self.phases.values() for c, _, _ in phase.trace.messages()}
        # Each role is loaded, and the student's metrics are put together, over all of its ranks.
        spans = {max(names, key=len) for names in self.groups.values() if names}
        groups = {ranks for ranks in used | spans if len(ranks) > 1}
        return len(groups) + bool(groups)  # and all ranks of the run

    @staticmethod
    def worker(phase: str) -> str:
        """Recipe path of the role that a phase is of."""
        return f"teachers.{phase.partition(' ')[2]}" if phase.startswith("scoring") else "student"

    def group(self, phase: str, collective: Collective) -> str:
        """What the group of a phase's collective is for."""
        return self.groups[self.worker(phase)].get(collective.ranks, "other")
