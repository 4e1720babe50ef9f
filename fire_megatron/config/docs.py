"""The reference of every recipe key, made from the schema: ``python -m fire_megatron.config.docs > docs/recipe.md``."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, Literal

from fire_megatron.config.errors import join_key
from fire_megatron.config.schema import Recipe
from fire_megatron.config.section import INLINE, FieldSpec, Hint, describe, parse_hint, specs
from fire_megatron.config.walk import plain

EXAMPLE = """\
run: {name: first, dir: runs/first, steps: 20}
student:
  checkpoint: checkpoints/student
  parallel: {tensor: 1, pipeline: 2}
teachers:
  math: {checkpoint: checkpoints/math}
  code: {checkpoint: checkpoints/code, labels: [python, sql]}
data:
  train:
    - {path: data/problems.jsonl, label: math}
    - {path: data/programs.jsonl}   # each row names its own label
rollout: {prompts_per_step: 16, max_new_tokens: 128}
loss:
  hooks:
    - {name: filter, percentile: 30}
    - {name: reweight}
optimizer: {lr: 1e-5}
"""

_INTRODUCTION = f"""\
# Recipe reference

<!-- Made by `python -m fire_megatron.config.docs > docs/recipe.md`; a test compares the two. -->

A recipe is one YAML file. Keys that are missing take the default; a key that does not exist, or a value of another
type or out of range, is an error that names the key and the fix. The recipe as used, every default written out, is
saved in the run's folder.

```yaml
{EXAMPLE}```

On the command line, `a.b.c=value` changes any key: `optimizer.lr=3e-6`, `data.train.0.path=x.jsonl` (the index after
the last adds an entry), `teachers.code.checkpoint=DIR` (a name that is not there yet adds a teacher),
`loss.hooks.filter.percentile=40`, `loss.hooks=[]`. The value is YAML.
"""


@cache
def field_docs(section: type) -> Mapping[str, str]:
    """The string below each field of a section and of the classes that it inherits from, as one line each."""
    result: dict[str, str] = {}
    for owner in reversed(section.__mro__):
        if owner.__module__ == "builtins":
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(tree, ast.ClassDef)
        for entry, below in zip(tree.body, tree.body[1:], strict=False):
            text = below.value if isinstance(below, ast.Expr) else None
            if isinstance(entry, ast.AnnAssign) and isinstance(text, ast.Constant) and isinstance(text.value, str):
                assert isinstance(entry.target, ast.Name)
                result[entry.target.id] = " ".join(text.value.split())
    return result


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _default(spec: FieldSpec) -> str:
    if spec.default is MISSING:
        return "required"
    hint = parse_hint(spec.hint)
    return "" if hint.is_section else f"`{json.dumps(plain(spec.default))}`"


def _nested(hint: Hint) -> tuple[str, type] | None:
    """How the section below a field is reached, and its class: one, a list of them, or a mapping by name."""
    if hint.is_section:
        return "", hint.type
    if hint.origin in (tuple, dict):
        inner = parse_hint(hint.item())
        return ("N" if hint.origin is tuple else "NAME", inner.type) if inner.is_section else None
    return None


def _allowed(spec: FieldSpec, key: str) -> str:
    hint = parse_hint(spec.hint)
    nested = _nested(hint)
    if nested is None:
        choices = [f"`{choice}`" for choice in hint.args] if hint.origin is Literal else []
        return " or ".join(choices) if choices else describe(spec.hint)
    kind = {"": "section", "N": "list of", "NAME": "mapping of names to"}[nested[0]]
    return f"{kind} [{join_key(key, nested[0])}](#{_anchor(join_key(key, nested[0]))})"


def _anchor(heading: str) -> str:
    return heading.lower().replace(".", "")


def _table(section: type, key: str) -> Iterator[str]:
    yield "| key | allowed | default | meaning |"
    yield "|---|---|---|---|"
    for name, spec in specs(section).items():
        if not spec.inline:
            cells = (f"`{name}`", _allowed(spec, join_key(key, name)), _default(spec), field_docs(section)[name])
            yield f"| {' | '.join(map(_cell, cells))} |"


def _summary(section: type) -> str:
    return " ".join((section.__doc__ or "").split())


def _pages(section: type, key: str, seen: dict[type, str]) -> Iterator[str]:
    """The tables of a section and of all below it; a class met before is referred to."""
    if key:
        yield f"\n## {key}\n"
    if section in seen:
        yield f"As [{seen[section]}](#{_anchor(seen[section])})."
        return
    seen[section] = key
    if key:
        yield f"{_summary(section)}\n"
    else:
        yield ""
    yield from _table(section, key)
    for entry in fields(section):
        yield from _variants(entry.metadata.get(INLINE, {}), key)
    for name, spec in specs(section).items():
        nested = None if spec.inline else _nested(parse_hint(spec.hint))
        if nested is not None:
            yield from _pages(nested[1], join_key(join_key(key, name), nested[0]), seen)


def _variants(options: Mapping[str, Any], key: str) -> Iterator[str]:
    """Keys that depend on the section's name."""
    for name, section in options.items():
        yield f"\n### {key}, name: {name}\n"
        yield f"{_summary(section)}\n"
        yield from _table(section, key)


def reference() -> str:
    """The page, as Markdown."""
    return "\n".join([_INTRODUCTION.rstrip("\n"), "\n## Sections", *_pages(Recipe, "", {})]) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
