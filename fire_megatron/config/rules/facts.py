"""What rules look at: one model, or the whole recipe, with all that is known of it so far."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

from fire_megatron.config.data import BenchmarkConfig, SourceConfig
from fire_megatron.config.hf_config import ModelShape
from fire_megatron.config.roles import roles
from fire_megatron.config.schema import Recipe, RoleConfig
from fire_megatron.config.spans import parse_span, span_problems


class Vocabulary(Protocol):
    """What rules ask of a tokenizer."""

    vocab_size: int
    """One more than the largest token id."""
    has_chat_template: bool
    """Whether chats can be written as tokens."""


@dataclass(frozen=True)
class Machine:
    """What only the machine that computes can tell."""

    kind: str
    """``cpu`` or ``cuda``."""
    no_engine: str | None
    """Why Transformer Engine does not work there (``not installed``); None where it does."""
    no_fp8: Callable[[str], str | None]
    """Why an FP8 recipe does not work there; None where it does. Asked where Transformer Engine works."""


@dataclass(frozen=True)
class Role:
    """A model with a job, and what is known of it; None where that is not known."""

    at: Callable[[str], str]
    """From a key of the role's section, such as ``parallel.tensor``, to what the user has written it as."""
    config: RoleConfig
    trains: bool
    shape: ModelShape | None = None
    ranks: int | None = None
    """How many hold it."""
    kind: str | None = None
    """``cpu`` or ``cuda``: where it computes."""
    machine: Machine | None = None
    tokenizer: Vocabulary | None = None

    @property
    def no_engine(self) -> str | None:
        """Why its layers are not Transformer Engine's; None where they are, or where that is not known."""
        if self.config.layer_spec == "local":
            return f"{self.at('layer_spec')} is local"
        if self.kind == "cpu":
            return "run.device is cpu" if self.machine is None else "there is no GPU"
        found = self.machine and self.machine.no_engine
        return f"Transformer Engine cannot be used ({found})" if found else None

    @property
    def copy_ranks(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.config.parallel.tensor * self.config.parallel.pipeline * self.config.parallel.context


@dataclass(frozen=True)
class Facts:
    """A recipe and what is known of it."""

    recipe: Recipe
    world_size: int | None
    """Ranks of the run; None when that is not known, as in a dry run."""
    shapes: Mapping[str, ModelShape] = field(default_factory=dict)
    """Architecture of every role whose checkpoint has a readable one, by the role's key."""
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """What is wrong with the ``config.json`` of the others."""
    elsewhere: Mapping[str, Path] = field(default_factory=dict)
    """In a plan for another machine: by the role's key, a folder that has the architecture of a checkpoint which is not
    on this one."""
    machine: Machine | None = None
    hooks: Collection[str] | None = None
    """Names of all hooks, once the modules of ``run.plugins`` have registered theirs."""
    scopes: Sequence[str] | None = None
    """What each of ``loss.hooks`` takes its statistics over, once it is made."""
    tokenizer: Vocabulary | None = None
    """The student's, which all roles share."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Of every role's tokenizer, by the role's key: equal exactly when every id stands for the same token."""
    mixed: Sequence[str] | None = None
    """Labels of the rows to train on that go to several teachers; None until they are read."""

    @cached_property
    def roles(self) -> dict[str, Role]:
        """Every role by its key: ``student``, ``teachers.math``."""
        configs, device, size = roles(self.recipe), self.recipe.run.device, self.world_size
        kind = self.machine.kind if self.machine else None if device == "auto" else device
        sound = size is not None and not any(span_problems({k: c.ranks for k, c in configs.items()}, size))
        return {
            key: Role(
                at=f"{key}.{{}}".format,
                config=config,
                trains=key == "student",
                shape=self.shapes.get(key),
                ranks=parse_span(config.ranks, size).count if sound and size else None,
                kind=kind,
                machine=self.machine,
                tokenizer=self.tokenizer,
            )
            for key, config in configs.items()
        }

    @property
    def sources(self) -> dict[str, SourceConfig]:
        """Every file of prompts by its key."""
        train = {f"data.train.{i}": source for i, source in enumerate(self.recipe.data.train)}
        held_out = {f"evaluation.prompts.{i}": source for i, source in enumerate(self.recipe.evaluation.prompts)}
        return train | held_out

    @property
    def benchmarks(self) -> dict[str, BenchmarkConfig]:
        """Every file of problems by its key."""
        return {f"evaluation.benchmarks.{i}": file for i, file in enumerate(self.recipe.evaluation.benchmarks)}
