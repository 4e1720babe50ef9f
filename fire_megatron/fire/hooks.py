"""The hook protocol and the registry that recipes name hooks from.

A hook of your own::

    @register_hook("drop_short")
    def build(min_tokens: int = 8) -> Hook:
        def hook(batch, selection, reducer):
            return selection.drop(batch.mask_BR.sum(-1) < min_tokens, "short")
        return hook

in a module that the recipe lists under ``run.plugins``; then ``loss.hooks: [{name: drop_short, min_tokens: 16}]``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Protocol

from fire_megatron.config.errors import RecipeError
from fire_megatron.config.schema import FilterOptions, HookConfig, ReweightOptions
from fire_megatron.fire.batch import FireBatch, Reducer, Selection
from fire_megatron.fire.filter import filter_trajectories
from fire_megatron.fire.reweight import reweight_tokens


class Hook(Protocol):
    """Reads the scores and what earlier hooks decided; returns what now holds. Collective over the reducer's ranks:
    every rank calls it, also one without rows."""

    def __call__(self, batch: FireBatch, selection: Selection, reducer: Reducer) -> Selection:
        """Decide."""
        ...


HookFactory = Callable[..., Hook]
_REGISTRY: dict[str, HookFactory] = {}


def register_hook(name: str) -> Callable[[HookFactory], HookFactory]:
    """Register a factory under a recipe name; its keyword arguments are the hook's options.

    Raises:
        ValueError: the name is taken.
    """

    def add(factory: HookFactory) -> HookFactory:
        if name in _REGISTRY:
            raise ValueError(f"a hook named {name!r} is already registered ({_REGISTRY[name]!r})")
        _REGISTRY[name] = factory
        return factory

    return add


@register_hook("filter")
def _filter(**options: object) -> Hook:
    return filter_trajectories(FilterOptions(**options))  # type: ignore[arg-type]


@register_hook("reweight")
def _reweight(**options: object) -> Hook:
    return reweight_tokens(ReweightOptions(**options))  # type: ignore[arg-type]


def build_hooks(configs: Sequence[HookConfig]) -> list[Hook]:
    """Make the hooks of ``loss.hooks``, in order.

    Raises:
        RecipeError: an unregistered name, or options that the hook does not take.
    """
    hooks = []
    for index, config in enumerate(configs):
        factory = _REGISTRY.get(config.name)
        if factory is None:
            near = difflib.get_close_matches(config.name, _REGISTRY, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise RecipeError(
                f"loss.hooks.{index}.name: no hook named {config.name!r} is registered (known: "
                f"{', '.join(sorted(_REGISTRY))}){hint}; a hook of your own needs its module in run.plugins"
            )
        try:
            hooks.append(factory(**config.options))
        except TypeError as error:
            raise RecipeError(f"loss.hooks.{index} ({config.name}): {error}") from error
    return hooks
