"""``docs/recipe.md`` is what the schema says today."""

import re
from pathlib import Path

import yaml

from fire_megatron.config.docs import EXAMPLE, reference
from fire_megatron.config.load import recipe_from_dict
from fire_megatron.config.loss import BUILTIN_HOOKS
from fire_megatron.config.messages import all_keys, parse_hint
from fire_megatron.config.schema import Recipe, TeacherConfig
from fire_megatron.config.section import Section
from fire_megatron.config.yaml_text import parse_yaml

PAGE = Path(__file__).resolve().parents[3] / "docs" / "recipe.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == reference(), "run: python -m fire_megatron.config.docs > docs/recipe.md"


def test_the_example_is_a_recipe() -> None:
    recipe = recipe_from_dict(parse_yaml(EXAMPLE, source="example"))
    assert recipe.optimizer.lr == 1e-5 and list(recipe.teachers) == ["math", "code"]
    assert yaml.safe_load(EXAMPLE)["run"]["steps"] == recipe.run.steps


def _sections(section: type, seen: set[type]) -> set[type]:
    seen.add(section)
    for field in section.model_fields.values():
        hint = parse_hint(field)
        inner = parse_hint(hint.item()) if hint.origin in (tuple, dict) else hint
        if inner.is_section and inner.type not in seen:
            _sections(inner.type, seen)
    return seen


def test_every_section_and_field_has_a_docstring() -> None:
    sections = _sections(Recipe, set(BUILTIN_HOOKS.values()))
    assert len(sections) > 12
    for section in sections:
        assert section.__doc__ and section.__doc__ != Section.__doc__ and not section.__doc__.startswith("Recipe(")
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name} has no docstring"


def test_inherited_fields_keep_their_docstring() -> None:
    assert "converted checkpoint" in TeacherConfig.model_fields["checkpoint"].description


def test_every_key_is_on_the_page_and_every_link_has_a_target() -> None:
    page = reference()
    for key in all_keys(Recipe):
        assert f"`{key.rsplit('.', 1)[-1]}`" in page
    headings = {
        line[3:].lower().replace(".", "").replace(" ", "-") for line in page.splitlines() if line.startswith("## ")
    }
    assert set(re.findall(r"\]\(#([^)]*)\)", page)) <= headings
