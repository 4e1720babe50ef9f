"""Rules on what a training pass recomputes: ``megatron.recompute_...``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fire_megatron.config.errors import RecipeProblem
from fire_megatron.config.megatron_fields import ENGINE_MODULES
from fire_megatron.config.messages import nearest
from fire_megatron.config.rules.facts import Role
from fire_megatron.config.spans import pipeline_stages

_MODULES = ("core_attn", "mlp", "moe", *ENGINE_MODULES)
_NEEDS = {"recompute_method": "full", "recompute_num_layers": "full", "recompute_modules": "selective"}


def recomputation(role: Role) -> Iterator[RecipeProblem]:
    """What of a student's recomputation has no effect, or ends in an error of megatron-core's as it trains."""
    given = {name: value for name, value in role.config.megatron.items() if value is not None}
    granularity = given.get("recompute_granularity")
    if not role.trains:
        return  # rules/megatron.py says that it has no effect
    for name, needed in _NEEDS.items():
        if name in given and granularity != needed:
            key = role.at("megatron.recompute_granularity")
            yield RecipeProblem(
                role.at(f"megatron.{name}"), f"has no effect unless {key} is {needed}; set that, or leave it out"
            )
    if granularity == "full":
        yield from _layers(role, given)
    elif granularity == "selective" and isinstance(given.get("recompute_modules"), list):
        for text in _modules(role, given["recompute_modules"]):
            yield RecipeProblem(role.at("megatron.recompute_modules"), text)


def _layers(role: Role, given: dict[str, Any]) -> Iterator[RecipeProblem]:
    method, number = given.get("recompute_method"), given.get("recompute_num_layers")
    if method is None or number is None:
        missing = [name for name in ("recompute_method", "recompute_num_layers") if name not in given]
        yield RecipeProblem(
            role.at("megatron.recompute_granularity"),
            f"full needs {' and '.join(missing)} beside it; recompute_method: uniform with recompute_num_layers: 1 "
            "keeps the least",
        )
    if type(number) is not int:
        return  # missing, or of a type that megatron-core will refuse
    stages: list[int] = []
    if role.shape and role.config.parallel.pipeline <= role.shape.num_layers:
        stages = sorted(set(pipeline_stages(role.shape.num_layers, role.config.parallel.pipeline)))
    text, where = None, f"{' and '.join(map(str, stages))} layers of {'the' if len(stages) > 1 else 'each of the'}"
    if number < 1:
        text = "is below 1; give a number of layers"
    elif method == "uniform" and any(layers % number for layers in stages):
        fits = [n for n in range(1, stages[0] + 1) if not any(layers % n for layers in stages)]
        text = f"does not divide the {where} pipeline stages; take {' or '.join(map(str, fits))}"
    elif method == "block" and stages and number > stages[-1]:
        text = f"exceeds the {where} pipeline stages; lower it"
    if text:
        yield RecipeProblem(role.at("megatron.recompute_num_layers"), f"{number} {text}")


def _modules(role: Role, modules: list[Any]) -> Iterator[str]:
    shape, low = role.shape, _low_precision(role)
    routed = shape and [shape.has_experts(layer) for layer in range(shape.num_layers)]
    absent = {
        "mlp": ("every layer has experts" if routed and all(routed) else None),
        "moe": ("the model has no experts" if routed and not any(routed) else None),
        "layernorm": (
            "norms are part of Transformer Engine's linear layers"
            if role.machine and not role.no_engine and routed and not any(routed)
            else None
        ),
    }
    if not modules:
        yield "names nothing to recompute; leave it out for core_attn"
    for module in modules:
        if module not in _MODULES:
            close = nearest(str(module), _MODULES)
            yield f"{module!r} is no part of these models; {f'did you mean {close}?' if close else 'leave it out'}"
        elif absent.get(module):
            yield f"{module!r} has no effect: {absent[module]}; leave it out"
        elif module == "moe" and low:
            yield (
                f"'moe' with {low} reads process groups that only megatron-core's own set-up makes; leave 'moe' out, "
                "or take recompute_granularity: full"
            )
        elif module in ENGINE_MODULES and role.no_engine:
            yield f"{module!r} needs Transformer Engine and {role.no_engine}; leave it out, or take another part"
        elif module in ENGINE_MODULES and not role.config.megatron_untested:
            yield f"nobody has tried {module!r} here; leave it out, or set {role.at('megatron_untested')}=true"


def _low_precision(role: Role) -> str | None:
    """The setting that has Transformer Engine compute in less than 16 bits."""
    fp8 = role.config.precision.fp8
    if fp8 is not None and not fp8.emulate:
        return role.at("precision.fp8")
    return role.at("megatron.fp4") if role.config.megatron.get("fp4") else None
