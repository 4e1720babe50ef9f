"""For the tests of the rule book: a changed recipe is asked about, and changes that several tests make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fire_megatron.config.checks import check_recipe
from fire_megatron.config.errors import RecipeProblems
from fire_megatron.config.load import recipe_from_dict
from fire_megatron.config.rules.facts import Machine

Values = dict[str, Any]

GPU = Machine("cuda", None, lambda recipe: "no Blackwell" if recipe == "mxfp8" else None)
BARE_GPU = Machine("cuda", "not installed", lambda recipe: None)
CPU = Machine("cpu", "not installed", lambda recipe: None)
EXPERTS = {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
MIXED = EXPERTS | {"intermediate_size": 65, "mlp_only_layers": [0]}
FILE = "{prompts}"
TWO = {"hooks": [{"name": "filter"}, {"name": "reweight", "scope": "microbatch"}]}


class Tokens:
    """A tokenizer, as far as rules look at it."""

    def __init__(self, vocab_size: int = 200, has_chat_template: bool = False) -> None:
        self.vocab_size, self.has_chat_template = vocab_size, has_chat_template


def ask(values: Values, changes: Values) -> None:
    """Ask about changed values. A change is that of a dotted key, of ``ROLE/config.json``, of ``world_size``, or of
    something else that is ``known``."""
    known: Values = dict(changes.get("known", {}))
    prompts = values["data"]["train"][0]["path"]
    for key, change in changes.items():
        change = json.loads(json.dumps(change).replace(FILE, prompts)) if key != "known" else change
        if key.endswith("/config.json"):
            path = Path(_at(values, f"{key.partition('/')[0]}.checkpoint")) / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | change))
        elif key not in ("known", "world_size"):
            section, _, last = key.rpartition(".")
            _at(values, section)[last] = change
    check_recipe(recipe_from_dict(values), world_size=changes.get("world_size"), **known)


def one_problem(values: Values, changes: Values, says: str) -> None:
    """Ask about changed values, which have to be refused for one reason alone."""
    with pytest.raises(RecipeProblems) as caught:
        ask(values, changes)
    message = str(caught.value)
    assert says in message and len(caught.value.problems) == 1, message


def _at(values: Any, key: str) -> Any:
    for name in filter(None, key.split(".")):
        values = values[int(name)] if name.isdigit() else values.setdefault(name, {})
    return values


def fp8(role: str = "student", *, device: str = "cuda", **settings: Any) -> Values:
    """FP8 for a role, on a GPU."""
    return {"run.device": device, f"{role}.precision": {"dtype": "bfloat16", "fp8": settings}}


def megatron(field: str, value: Any, role: str = "student") -> Values:
    """A field of TransformerConfig."""
    return {f"{role}.megatron": {field: value}}


def untried(field: str, value: Any, role: str = "student") -> Values:
    """The same for one that needs to be called untested."""
    return megatron(field, value, role) | {f"{role}.megatron_untested": True}


def recompute(*, experts: bool = False, pipeline: int = 1, **fields: Any) -> Values:
    """Recomputation of a student of 4 layers."""
    settings = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1} | fields
    model: Values = {"student/config.json": EXPERTS} if experts else {}
    return {"student.megatron": settings, "student.parallel.pipeline": pipeline} | model


def parts(*modules: str, **more: Any) -> Values:
    """Recomputation of parts of layers."""
    fields = {"recompute_granularity": "selective", "recompute_modules": list(modules)}
    return recompute(recompute_method=None, recompute_num_layers=None, **fields, **more)


def hooked(*names: str, **known: Any) -> Values:
    """Hooks of the loss."""
    return {"loss.hooks": [{"name": name} for name in names], "known": known}
