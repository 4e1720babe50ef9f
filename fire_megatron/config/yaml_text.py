"""YAML as people mean it: the scalars of YAML 1.2, duplicate keys refused, errors with file and line.

PyYAML follows YAML 1.1, where ``on`` and ``no`` are booleans, ``1e-5`` is a string, ``010`` is eight and ``12:30``
is 750. None of that survives here.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

from fire_megatron.config.errors import RecipeError

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?(\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_NULL = re.compile(r"~|null|Null|NULL|")
_RESOLVERS = (("null", _NULL), ("bool", _BOOL), ("int", _INT), ("float", _FLOAT))


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars, unique keys, and no recursive aliases."""

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}

    def unique_mapping(self, node: yaml.MappingNode) -> dict[Any, Any]:
        """A mapping whose keys all differ; ``<<`` merges as usual and may be overridden."""
        seen: dict[Any, yaml.Mark] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (dict, list)):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key in seen:
                message = f"duplicate key {key!r}; it is already on line {seen[key].line + 1}, remove one of them"
                raise yaml.constructor.ConstructorError(None, None, message, key_node.start_mark)
            seen[key] = key_node.start_mark
        return self.construct_mapping(node, deep=True)

    def whole_sequence(self, node: yaml.SequenceNode) -> list[Any]:
        """A list that is made with all that is in it, so that it cannot hold itself."""
        return self.construct_sequence(node, deep=True)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value, {"0o": 8, "0x": 16}.get(node.value[:2], 10))


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


for _name, _pattern in _RESOLVERS:
    _Loader.yaml_implicit_resolvers.setdefault(None, []).append(
        (f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern.pattern})\\Z"))
    )
_Loader.yaml_implicit_resolvers[None].append(("tag:yaml.org,2002:merge", re.compile(r"<<\Z")))
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.unique_mapping)
_Loader.add_constructor("tag:yaml.org,2002:seq", _Loader.whole_sequence)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every string which either YAML version would take for something else."""

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {
        key: list(value) for key, value in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }

    def ignore_aliases(self, data: Any) -> bool:
        """Write a value in full each time it occurs."""
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML's single-quoted style loses Unicode line breaks; the double-quoted one escapes them.
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
for _tag, _regexp in _Loader.yaml_implicit_resolvers[None]:
    _Dumper.yaml_implicit_resolvers.setdefault(None, []).append((_tag, _regexp))


def parse_yaml(text: str, *, source: str) -> Any:
    """Plain values from YAML text.

    Args:
        text: one document.
        source: where it comes from, for messages.

    Raises:
        RecipeError: not valid YAML; the message has source and line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        context = f" {error.context}" if error.context else ""
        raise RecipeError(f"{where}: {error.problem}{context}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{source}: {error}") from error
    except RecursionError as error:
        raise RecipeError(f"{source}: nested too deeply to be a recipe") from error


def dump_yaml(values: Any) -> str:
    """YAML text of plain values; keys keep their order, and every YAML reader gets the same values back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
