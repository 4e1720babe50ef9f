"""Rules on ``megatron``, fields of megatron-core's TransformerConfig that are passed through: config/megatron_fields.py
says which, and rules/recomputation.py what recomputation asks besides.

Which fields the installed release has, and their types, models/build.py finds out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from fire_megatron.config.errors import RecipeProblem
from fire_megatron.config.megatron_fields import ENGINE_MODULES, ENGINE_ONLY, FIELDS, TRAINING_ONLY
from fire_megatron.config.messages import nearest
from fire_megatron.config.rules.facts import Role

_COEFFICIENTS = ("moe_aux_loss_coeff", "moe_z_loss_coeff")
_ONE_CHOICE = {
    "moe_router_load_balancing_type": (
        "packs hold rows of many lengths and replicas differ in their number of micro-batches, so the balance is taken "
        "within a micro-batch"
    ),
    "moe_token_dispatcher_type": "micro-batches differ in length, which allgather refuses",
    "moe_router_dtype": "other formats route a token in another way than its checkpoint has learned",
}
"""Why a field takes no other values."""


def overrides(role: Role) -> Iterator[RecipeProblem]:
    for field, value in role.config.megatron.items():
        text = _refusal(role, field, value)
        if text:
            yield RecipeProblem(role.at(f"megatron.{field}"), text)
    if role.config.megatron_untested and not any(_is_untested(*item) for item in role.config.megatron.items()):
        yield RecipeProblem(
            role.at("megatron_untested"), f"true, but no field of {role.at('megatron')} needs it; leave it out"
        )


def _is_untested(field: str, value: Any) -> bool:
    if field == "recompute_modules":
        return isinstance(value, list) and any(module in ENGINE_MODULES for module in value)
    return field not in FIELDS or FIELDS[field].kind == "untested"


def _refusal(role: Role, field: str, value: Any) -> str | None:
    if field not in FIELDS:
        return None if role.config.megatron_untested else _unknown(role, field)
    known = FIELDS[field]
    if known.kind in ("checkpoint", "set"):
        return f"this is set by {role.at(known.text)}; leave it out"
    if known.kind == "idle":
        return f"has no effect: {known.text}; leave it out"
    if known.kind == "unsupported":
        return f"{known.text}; leave it out"
    text = _out_of_place(role, field, value) or _wrong_value(role, field, value)
    if text is None and known.kind == "untested" and not role.config.megatron_untested:
        return (
            f"nobody has tried it here ({known.text}); leave it out, or set {role.at('megatron_untested')}=true to try "
            "it, and compare a run's losses with those of one without it"
        )
    return text


def _unknown(role: Role, field: str) -> str:
    close = nearest(field, FIELDS)
    return (
        f"megatron-core 0.16 to 0.19 have no such field{f'; did you mean {close!r}?' if close else ';'} one of a newer "
        f"release needs {role.at('megatron_untested')}=true"
    )


def _out_of_place(role: Role, field: str, value: Any) -> str | None:
    """Why a field does nothing for this model and layout."""
    if field.startswith("moe_") and role.shape and role.shape.experts is None:
        return "the model has no experts; leave it out"
    if field in TRAINING_ONLY and not role.trains:
        return "a teacher is not trained, so it has no effect; leave it out"
    if field == "deallocate_pipeline_outputs" and role.config.parallel.pipeline == 1:
        return f"has no effect, since {role.at('parallel.pipeline')} is 1; leave it out"
    fp8 = role.config.precision.fp8
    if field == "tp_only_amax_red" and (fp8 is None or fp8.emulate):
        return f"has no effect without {role.at('precision.fp8')} on a GPU; leave it out"
    if field in ENGINE_ONLY and value and role.no_engine:
        return f"{value!r} needs Transformer Engine's kernels and {role.no_engine}; leave it out"
    return None


def _wrong_value(role: Role, field: str, value: Any) -> str | None:
    values = FIELDS[field].values
    if field in _ONE_CHOICE and values and value not in values:
        return f"{value!r}, but {_ONE_CHOICE[field]}; use {' or '.join(values)}"
    if field in _COEFFICIENTS and (type(value) not in (int, float) or not 0 <= value < math.inf):
        return f"{value!r} is not allowed; give one number of at least 0"
    return None
