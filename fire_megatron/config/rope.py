"""Rotary positions as a ``config.json`` describes them, in any of transformers' forms. Imports no torch.

transformers 5 writes all of it into ``rope_parameters``; before, the base stood at the top and its scaling in
``rope_scaling``. Where a file has both, ``rope_scaling`` alone counts, in every release.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fire_megatron.config.hf_reader import Reader


@dataclass(frozen=True)
class Rope:
    """What it takes to compute a model's rotary angles."""

    theta: float
    """Base of the frequencies."""
    scaling: dict[str, Any] | None
    """None, or ``rope_type`` with all parameters of that type, defaults filled in."""
    rotary_dim: int
    """Dimensions of a head that are rotated."""
    positions: int
    """Longest sequence that the scaling is meant for."""


@dataclass(frozen=True)
class _Settings:
    """What the parameters of a type are read from."""

    given: Reader
    """The section of the file."""
    positions: int
    """``max_position_embeddings``."""
    original: float
    """Longest sequence that the model saw before its frequencies were scaled."""
    frequencies: int
    """Half of the dimensions that are rotated."""


def _linear(settings: _Settings) -> dict[str, Any]:
    return {"factor": settings.given.number("factor")}


def _dynamic(settings: _Settings) -> dict[str, Any]:
    """The one type whose context before scaling is ``max_position_embeddings`` whatever else the file says."""
    return {"factor": settings.given.number("factor"), "original_max_position_embeddings": settings.positions}


def _llama3(settings: _Settings) -> dict[str, Any]:
    given = settings.given
    scaling = {key: given.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor")}
    if not scaling["high_freq_factor"] > scaling["low_freq_factor"]:
        raise given.fail(f"{given.where}high_freq_factor must exceed low_freq_factor; got {scaling}")
    return {**scaling, "original_max_position_embeddings": settings.original}


def _yarn(settings: _Settings) -> dict[str, Any]:
    """The attention factor's default is 0.1 ln(factor) + 1 (Peng et al. 2023, arXiv 2309.00071, eq. 22), or DeepSeek's
    quotient of two such numbers."""
    given = settings.given
    # As in transformers, an explicit null is another value than none.
    written = "factor" in given.values
    factor = given.number("factor", otherwise=settings.positions / settings.original if written else None)

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    attention = magnitude(1.0)
    if given.values.get("mscale") and given.values.get("mscale_all_dim"):
        attention = magnitude(given.number("mscale")) / magnitude(given.number("mscale_all_dim"))
    return {
        "factor": factor,
        "original_max_position_embeddings": settings.original,
        "attention_factor": given.number("attention_factor", otherwise=attention),
        "beta_fast": given.number("beta_fast", otherwise=32.0),
        "beta_slow": given.number("beta_slow", otherwise=1.0),
        "truncate": given.flag("truncate", otherwise="truncate" not in given.values),
    }


def _longrope(settings: _Settings) -> dict[str, Any]:
    """The attention factor's default is that of Ding et al. 2024 (arXiv 2402.13753), section 3.4."""
    given, original = settings.given, settings.original
    factor = given.number("factor", otherwise=settings.positions / original)
    attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {
        "short_factor": given.numbers("short_factor", settings.frequencies),
        "long_factor": given.numbers("long_factor", settings.frequencies),
        "original_max_position_embeddings": original,
        "attention_factor": given.number("attention_factor", otherwise=attention),
    }


_PARAMETERS: Mapping[str, Callable[[_Settings], dict[str, Any]]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
ROPE_TYPES: Mapping[str, str] = {kind: kind for kind in ("default", *_PARAMETERS)}
"""What a ``rope_type`` means, by how it is written."""

BY_LENGTH = ("dynamic", "longrope")
"""Scalings under which angles depend on how long a row is."""


def read_rope(config: Reader, *, head_dim: int, types: Mapping[str, str], partial: bool) -> Rope:
    """Base, scaling and width of the rotary positions.

    Args:
        config: of the whole file.
        head_dim: width of a head.
        types: the model family's supported values of ``rope_type`` and what they mean.
        partial: whether transformers' model of the family can rotate a part of each head.

    Raises:
        CheckpointError: values of a wrong type, a scaling that is not supported, or one that contradicts itself.
    """
    name = "rope_scaling" if config.values.get("rope_scaling") else "rope_parameters"
    section = config.values.get(name) or {}
    if not isinstance(section, Mapping) or any(isinstance(value, Mapping) for value in section.values()):
        raise config.fail(f"{name} is {section!r}; it must be one mapping for all layers")
    given = Reader(config.path, section, f"{name}.")
    theta = (given if "rope_theta" in section else config).number("rope_theta")
    rotary_dim = _rotary_dim(config, given, head_dim, partial)
    kind = _rope_type(given, types)
    positions = config.integer("max_position_embeddings")
    if kind == "default":
        return Rope(theta, None, rotary_dim, positions)
    # At the top of the file it comes before the section's; without either the model has seen all its positions.
    top = config.values.get("original_max_position_embeddings") is not None
    original = (config if top else given).number("original_max_position_embeddings", otherwise=positions)
    scaling = _PARAMETERS[kind](_Settings(given, positions, original, -(-rotary_dim // 2)))
    # transformers 5 writes the positions before scaling for these: their factor says how far it reaches.
    reach = {"linear": positions, "dynamic": positions, "yarn": original}.get(kind, 0) * scaling.get("factor", 1.0)
    return Rope(theta, {"rope_type": kind, **scaling}, rotary_dim, max(positions, int(reach)))


def _rope_type(given: Reader, types: Mapping[str, str]) -> str:
    written = [given.values[key] for key in ("rope_type", "type") if given.values.get(key) is not None]
    if len(written) == 2 and len({str(types.get(word, word)) for word in written}) > 1:
        raise given.fail(
            f"{given.where}rope_type is {written[0]!r} and {given.where}type is {written[1]!r}; transformers 5 reads "
            "the first and transformers 4 the second; remove the wrong one in a copy of the checkpoint"
        )
    kind = written[0] if written else "default"
    if not isinstance(kind, str) or kind not in types:
        raise given.fail(f"{given.where}rope_type is {kind!r}; supported: {', '.join(types)}")
    return types[kind]


def _rotary_dim(config: Reader, given: Reader, head_dim: int, partial: bool) -> int:
    source = given if given.values.get("partial_rotary_factor") is not None else config
    fraction = source.number("partial_rotary_factor", otherwise=1.0)
    if fraction != 1.0 and not partial:
        raise config.fail(
            f"{source.where}partial_rotary_factor is {fraction}, which transformers' model of this family does not "
            "follow (of its releases, some rotate whole heads and some fail); remove it in a copy of the checkpoint if "
            "the model was trained with whole heads"
        )
    width = int(head_dim * fraction)
    if fraction > 1.0 or width < 1:
        raise config.fail(
            f"{source.where}partial_rotary_factor is {fraction}, which leaves {width} of a head's {head_dim} "
            "dimensions to rotate; it must be a part of 1"
        )
    return width
