"""The hook protocol and the registry by whose names recipes call hooks.

A hook of your own, in a module that the recipe lists under ``run.plugins``::

    @register_hook("drop_short")
    def drop_short(min_tokens: int = 8) -> Hook:
        def hook(batch, selection, reducer):
            return selection.drop(batch.mask_BR.sum(-1) < min_tokens, "short")
        return hook

and in the recipe ``loss.hooks: [{name: drop_short, min_tokens: 16}, {name: filter}, {name: reweight}]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from fire_megatron.config.errors import RecipeError
from fire_megatron.config.loss import FilterOptions, HookConfig, ReweightOptions
from fire_megatron.fire.batch import FireBatch, Selection
from fire_megatron.fire.filter import Filter
from fire_megatron.fire.reweight import Reweight
from fire_megatron.parallel.reducer import Reducer


class Hook(Protocol):
    """Reads the scores and what earlier hooks decided, and returns what holds now.

    Every rank of the reducer calls every hook, also a rank without rows, so a hook calls the reducer equally often
    whatever its rows. A hook can drop rows, not bring back dropped ones. A hook with an attribute ``scope`` of
    ``microbatch`` is called once a micro-batch instead, with a reducer over this process alone. An attribute
    ``reasons`` lists the reasons it drops for, so that they are reported as 0 where there are none.
    """

    def __call__(self, batch: FireBatch, selection: Selection, reducer: Reducer) -> Selection:
        """Decide."""
        ...


HookFactory = Callable[..., Hook]
_REGISTRY: dict[str, HookFactory] = {}


def register_hook(name: str) -> Callable[[HookFactory], HookFactory]:
    """Decorator: register a factory under a recipe name; its keyword arguments are the hook's options.

    Raises:
        RecipeError: another factory has the name.
    """

    def add(factory: HookFactory) -> HookFactory:
        if name in _REGISTRY:
            raise RecipeError(
                f"a hook named {name!r} is already registered ({_REGISTRY[name]!r}); give {factory!r} another name"
            )
        _REGISTRY[name] = factory
        return factory

    return add


@register_hook("filter")
def _filter(**options: Any) -> Hook:
    return Filter(FilterOptions(**options))


@register_hook("reweight")
def _reweight(**options: Any) -> Hook:
    return Reweight(ReweightOptions(**options))


def registered_hooks() -> tuple[str, ...]:
    """Names of all hooks that are registered."""
    return tuple(_REGISTRY)


def build_hooks(configs: Sequence[HookConfig]) -> list[Hook]:
    """Make the hooks of ``loss.hooks``, in order; all of them are registered.

    Raises:
        RecipeError: options that a hook does not take, or a factory that returns no hook.
    """
    return [_build(index, config) for index, config in enumerate(configs)]


def _build(index: int, config: HookConfig) -> Hook:
    assert config.name in _REGISTRY, f"{config.name} has passed the rule on names"
    key = f"loss.hooks.{index} ({config.name})"
    try:
        hook = _REGISTRY[config.name](**config.options)
    except Exception as error:  # a factory of the user's may raise anything
        raise RecipeError(f"{key}: {error}") from error
    if not callable(hook):
        raise RecipeError(f"{key}: its factory returned {hook!r:.80}, which cannot be called; it must return the hook")
    scope, reasons = getattr(hook, "scope", "global"), getattr(hook, "reasons", ())
    if scope not in ("global", "microbatch"):
        raise RecipeError(f"{key}: its scope is {scope!r}; it must be 'global' or 'microbatch'")
    if not isinstance(reasons, tuple | list) or not all(isinstance(reason, str) for reason in reasons):
        raise RecipeError(f"{key}: its reasons are {reasons!r:.80}; they must be a tuple of texts")
    return hook
