"""What a run is trained with: recorded in its state, compared when it is resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from fire_megatron.checkpoint.fingerprint import model_fingerprint
from fire_megatron.config.errors import RecipeError
from fire_megatron.config.load import recipe_from_dict, recipe_to_dict
from fire_megatron.config.roles import roles
from fire_megatron.config.schema import Recipe
from fire_megatron.train.schedule import learning_rate

_PLACES = ("run.dir", "run.resume", "checkpoint.dir")
"""Keys that say where a run is and how to begin, not what it is."""
_RECORD = "trained_with"
_LONG = 60
"""Characters of a value that are shown."""


@dataclass(frozen=True)
class Provenance:
    """What a run is trained with, as plain values."""

    recipe: Mapping[str, Any]
    """With every default written out."""
    models: Mapping[str, str]
    """Fingerprint of the checkpoint of every role, by its key."""
    held_out: str
    """Fingerprint of the held-out prompts."""

    @classmethod
    def of(cls, recipe: Recipe, held_out: str = "") -> Provenance:
        """Looks at the roles' checkpoints. Raises CheckpointError: a file of them cannot be read."""
        models = {key: model_fingerprint(role.checkpoint) for key, role in roles(recipe).items()}
        return cls(recipe_to_dict(recipe), models, held_out)

    @classmethod
    def saved(cls, extra: Mapping[str, Any]) -> Provenance | None:
        """What a state records; None in one of a version that recorded nothing."""
        values = extra.get(_RECORD)
        return values and cls(values["recipe"], values["models"], values["held_out"])

    def record(self) -> dict[str, Any]:
        """To be saved in a state."""
        return {_RECORD: asdict(self)}

    def require_student(self, before: Provenance, checkpoint: Path) -> None:
        """Raises RecipeError: what was saved in ``checkpoint`` was trained from another student."""
        if self.models["student"] != before.models.get("student"):
            was, now = (each.recipe["student"]["checkpoint"] for each in (before, self))
            raise RecipeError(
                f"student.checkpoint: {checkpoint} was trained from {was}"
                + (", which holds another model by now" if was == now else f", and {now} holds another model")
                + ": it would not be used; restore it, or train it in a new run.dir"
            )

    def changes(self, before: Provenance, step: int) -> str:
        """What is not as it was when ``step`` steps were done, in words; empty where nothing is."""
        old, new = _complete(before.recipe), dict(self.recipe)
        moved = [f"{role}.checkpoint" for role in self.models if self.models[role] == before.models.get(role)]
        told = [text for key, text in _differences(old, new) if key not in (*_PLACES, *moved)]
        for role, model in self.models.items():
            if before.models.get(role, model) != model and _at(old, role) == _at(new, role):
                told.append(f"{role}.checkpoint holds another model")
        if before.held_out != self.held_out and not any("evaluation.prompts" in text for text in told):
            told.append("evaluation.prompts holds other prompts")
        return "; ".join([*told, *_rates(old, new, step)])


def _complete(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as an earlier version has recorded it, with the keys that have been added since."""
    try:
        return recipe_to_dict(recipe_from_dict(values))
    except RecipeError:
        return dict(values)


def _at(recipe: Mapping[str, Any], role: str) -> str | None:
    """The checkpoint of a role."""
    section, _, name = role.partition(".")
    return (recipe[section].get(name, {}) if name else recipe[section]).get("checkpoint")


def _differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, in words) of each value that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        pairs = [(name, old.get(name, _Absent), new.get(name, _Absent)) for name in {**old, **new}]
    elif isinstance(old, list) and isinstance(new, list):
        pairs = [(str(i), *pair) for i, pair in enumerate(zip_longest(old, new, fillvalue=_Absent))]
    else:
        pairs = []
        if old is _Absent or new is _Absent:
            yield key, f"{key} {'added' if old is _Absent else 'removed'}"
        elif old != new:
            yield key, f"{key} {_short(old)} -> {_short(new)}"
    for name, was, now in pairs:
        yield from _differences(was, now, f"{key}.{name}" if key else name)


class _Absent:
    """In place of a value that is not there."""


def _short(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= _LONG else f"{text[:_LONG]}..."


def _rates(old: Mapping[str, Any], new: Mapping[str, Any], step: int) -> Iterator[str]:
    """How the learning rate of the next step differs from what it was to be."""
    try:
        was, now = (
            learning_rate(recipe.optimizer, step, recipe.run.steps) for recipe in map(recipe_from_dict, (old, new))
        )
    except RecipeError:  # recorded by another version
        return
    if was != now:
        yield f"so the learning rate of step {step + 1} is {now:.3g}, which was to be {was:.3g}"
