"""The reference of every recipe key, made from the schema: ``python -m fire_megatron.config.docs > docs/recipe.md``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Literal

from pydantic.fields import FieldInfo

from fire_megatron.config.errors import join_key
from fire_megatron.config.megatron_fields import FIELDS, Field, Kind
from fire_megatron.config.messages import Hint, describe, parse_hint
from fire_megatron.config.schema import Recipe
from fire_megatron.config.section import Section, plain

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


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "" if parse_hint(field).is_section else f"`{json.dumps(plain(field.default))}`"


def _nested(hint: Hint) -> tuple[str, type] | None:
    """How the section below a field is reached, and its class: one, a list of them, or a mapping by name."""
    if hint.is_section:
        return "", hint.type
    if hint.origin in (tuple, dict):
        inner = parse_hint(hint.item())
        return ("N" if hint.origin is tuple else "NAME", inner.type) if inner.is_section else None
    return None


def _allowed(field: FieldInfo, key: str) -> str:
    hint = parse_hint(field)
    nested = _nested(hint)
    if nested is None:
        choices = [f"`{choice}`" for choice in hint.args] if hint.origin is Literal else []
        return " or ".join(choices) if choices else describe(field)
    kind = {"": "section", "N": "list of", "NAME": "mapping of names to"}[nested[0]]
    return f"{kind} [{join_key(key, nested[0])}](#{_anchor(join_key(key, nested[0]))})"


def _anchor(heading: str) -> str:
    return heading.lower().replace(".", "")


def _table(section: type[Section], key: str) -> Iterator[str]:
    yield "| key | allowed | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in section.model_fields.items():
        cells = (f"`{name}`", _allowed(field, join_key(key, name)), _default(field), _line(field.description))
        yield f"| {' | '.join(map(_cell, cells))} |"


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


def _pages(section: type[Section], key: str, seen: dict[type[Section], str]) -> Iterator[str]:
    """The tables of a section and of all below it; a class met before is referred to."""
    if key:
        yield f"\n## {key}\n"
    if section in seen:
        yield f"As [{seen[section]}](#{_anchor(seen[section])})."
        return
    seen[section] = key
    yield f"{_line(section.__doc__)}\n" if key else ""
    yield from _table(section, key)
    for name, variant in section.variants.items():
        yield f"\n### {key}, name: {name}\n"
        yield f"{_line(variant.__doc__)}\n"
        yield from _table(variant, key)
    for name, field in section.model_fields.items():
        nested = _nested(parse_hint(field))
        if nested is not None:
            yield from _pages(nested[1], join_key(join_key(key, name), nested[0]), seen)


_KINDS: dict[Kind, tuple[str, str]] = {
    "checkpoint": ("refused", "what the model is; an export could not carry another value"),
    "set": ("refused", "another key decides it"),
    "idle": ("refused", "no effect here"),
    "unsupported": ("refused", "not supported"),
    "untested": ("with `megatron_untested: true`", "nobody has tried it here"),
}


def _megatron_fields() -> Iterator[str]:
    """What each field of TransformerConfig means under ``megatron``."""
    yield "\n## Fields of megatron\n"
    yield (
        "Every field of TransformerConfig in megatron-core 0.16 to 0.19. Those of the first table work: tests train "
        "with them on CPUs in layouts of 2 and 4 ranks, with either release. The fields of a newer release need "
        "`megatron_untested: true`.\n"
    )
    yield "| field | meaning |"
    yield "|---|---|"
    yield from (f"| `{name}` | {_cell(field.text)} |" for name, field in FIELDS.items() if field.kind == "works")
    yield "\n| fields | allowed | why |"
    yield "|---|---|---|"
    for kind, (allowed, meaning) in _KINDS.items():
        texts = dict.fromkeys(field.text for field in FIELDS.values() if field.kind == kind)
        for text in texts:
            names = ", ".join(f"`{name}`" for name, field in FIELDS.items() if field == Field(kind, text))
            yield f"| {names} | {allowed} | {meaning}: {_cell(text)} |"


def reference() -> str:
    """The page, as Markdown."""
    pages = _pages(Recipe, "", {})
    return "\n".join([_INTRODUCTION.rstrip("\n"), "\n## Sections", *pages, *_megatron_fields()]) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
