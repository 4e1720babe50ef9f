"""YAML: scalars as people mean them, duplicate keys, errors with file and line."""

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fire_megatron.config.errors import RecipeError
from fire_megatron.config.yaml_text import dump_yaml, parse_yaml


def parse(text: str) -> Any:
    return parse_yaml(text, source="r.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("1.e-5", 1e-5),
        ("-.5", -0.5),
        ("+1.5e+3", 1500.0),
        ("3.", 3.0),
        ("1", 1),
        ("-7", -7),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("No", "No"),
        ("12:30:45", "12:30:45"),
        ("2026-11-24", "2026-11-24"),
        ("1_000", "1_000"),
        ("e5", "e5"),
        (".", "."),
        ("-", [None]),
        ("'1e-5'", "1e-5"),
        ("!!str 5", "5"),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    parsed = parse(text)
    assert parsed == value and type(parsed) is type(value)


def test_infinities_and_nan_are_numbers_which_the_schema_then_refuses() -> None:
    assert parse("[.inf, -.Inf]") == [float("inf"), float("-inf")]
    assert str(parse(".nan")) == "nan"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", "r.yaml:3: duplicate key 'a'; it is already on line 1, remove one of them"),
        ("t:\n  m: {x: 1, x: 1}\n", "r.yaml:2: duplicate key 'x'"),
        ("a: 1\n b: 2\n", "r.yaml:2: mapping values are not allowed here"),
        ("a: [1, 2\nb: 3\n", "r.yaml:2"),
        ("a: 'open\n", "r.yaml:2: found unexpected end of stream"),
        ("a:\n\t- b\n", "r.yaml:2: found character '\\t' that cannot start any token"),
        ("a: *nowhere\n", "r.yaml:1: found undefined alias 'nowhere'"),
        ("a: &a [*a]\n", "r.yaml:1: found unconstructable recursive node"),
        ("a: &a {b: *a}\n", "r.yaml:1: found unconstructable recursive node"),
        ("a: !!python/object/apply:os.system [ls]\n", "r.yaml:1: could not determine a constructor"),
        ("a: 1\n---\nb: 1\n", "r.yaml:2: but found another document"),
        ("? {a: 1}\n: 2\n", "r.yaml:1: a key must be a word"),
        ("a: " + "9" * 5000, "r.yaml: Exceeds the limit"),
        ("[" * 1000, "r.yaml: nested too deeply"),
    ],
)
def test_errors_have_file_and_line(text: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text)
    assert expected in str(caught.value)


def test_merge_keys_may_be_overridden() -> None:
    values = parse("base: &base {a: 1, b: 2}\nother:\n  <<: *base\n  b: 3\n")
    assert values["other"] == {"a": 1, "b": 3}


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
_VALUES = st.recursive(_SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(_VALUES)
def test_what_is_dumped_parses_to_the_same(value: Any) -> None:
    assert parse(dump_yaml(value)) == value


@pytest.mark.parametrize(
    "text", ["on", "no", "1e5", "1e-5", "010", "0o7", "12:30", "2026-11-24", "null", "~", "", "1_0"]
)
def test_text_that_looks_like_something_else_is_quoted(text: str) -> None:
    dumped = dump_yaml({"a": text})
    assert parse(dumped) == {"a": text} == yaml.safe_load(dumped)
