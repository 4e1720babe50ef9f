"""The architecture of a model, read from the ``config.json`` beside its weights. Imports no torch.

Both a Hugging Face folder and a converted checkpoint carry that file, so every reader of a model's shape comes here.
A new family is a row of :data:`FAMILIES` (and a row of the tensor maps in ``checkpoint/maps.py``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fire_megatron.config.checkpoints import download, looked_in
from fire_megatron.config.errors import CheckpointError


@dataclass(frozen=True)
class ExpertShape:
    """Mixture of experts: each token goes to the ``top_k`` experts that a softmax router prefers; none is dropped."""

    count: int
    """Experts of a layer."""
    top_k: int
    """Experts that a token goes to."""
    ffn: int
    """Width of one expert's gate."""
    normalised: bool
    """Whether the weights of a token's experts are divided by their sum."""
    dense_layers: tuple[int, ...] = ()
    """Layers, from 0, that have one MLP of the model's ``ffn`` instead."""


@dataclass(frozen=True)
class ModelShape:
    """What it takes to build a decoder-only transformer with RMSNorm, rotary positions and a SwiGLU MLP."""

    family: str
    """``model_type`` of the Hugging Face config; a key of :data:`FAMILIES`."""
    num_layers: int
    """Transformer layers."""
    hidden: int
    """Width of the residual stream."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key/value heads (groups); divides ``heads``."""
    head_dim: int
    """Width of a head; ``heads * head_dim`` need not equal ``hidden``."""
    ffn: int
    """Width of the MLP's gate."""
    vocab_size: int
    """Rows of the embedding as published, before padding for tensor parallelism."""
    max_positions: int
    """Longest sequence the model was configured for."""
    rope_theta: float
    """Base of the rotary frequencies."""
    norm_eps: float
    """Added to the mean square in every RMSNorm."""
    tied: bool
    """Whether the output layer is the embedding."""
    qkv_bias: bool = False
    """Whether q, k and v projections have a bias."""
    qk_norm: bool = False
    """Whether q and k are normalised per head before the rotary embedding."""
    rope_scaling: dict[str, Any] | None = field(default=None, hash=False)
    """None, or ``rope_type`` (``linear`` or ``llama3``) with that type's parameters, all present and positive."""
    sliding_window: int | None = None
    """Positions a token attends to, itself included; None when that is all of them."""
    experts: ExpertShape | None = None
    """The experts that stand in for the MLP of layers; None in a dense model."""

    def has_experts(self, layer: int) -> bool:
        """Whether a layer, from 0, is one of experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

    @property
    def mlp_widths(self) -> dict[str, int]:
        """Width of the gate in every kind of MLP that layers have, by its name in messages."""
        dense = self.experts is None or bool(self.experts.dense_layers)
        widths = {"the MLP": self.ffn} if dense else {}
        return widths | ({"an expert's MLP": self.experts.ffn} if self.experts else {})


@dataclass(frozen=True)
class Family:
    """How one ``model_type`` departs from the shared architecture."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers takes for a key that ``config.json`` leaves out, where it differs from :data:`_DEFAULTS`."""
    qkv_bias: bool = False
    """Biases on q, k, v."""
    qk_norm: bool = False
    """RMSNorm on q and k."""
    window: Callable[[_Reader], int | None] = lambda config: None
    """Reads the sliding window, or refuses it."""
    experts: Callable[[_Reader], ExpertShape | None] = lambda config: None
    """Reads the mixture of experts."""


class _Reader:
    """Typed access to a ``config.json``; every complaint names file, key and value."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values

    def fail(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")

    def integer(self, key: str, *, otherwise: int | None = None) -> int:
        """A positive whole number; ``otherwise`` stands for an absent or null key, which is an error without it."""
        value = self.values.get(key)
        value = otherwise if value is None else value
        if value is None:
            raise self.fail(f"{key} is missing; the file is incomplete, download it again")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.fail(f"{key} is {value!r}; it must be a whole number of at least 1")
        return value

    def number(self, key: str, values: Mapping[str, Any] | None = None, *, where: str = "") -> float:
        """A positive number."""
        value = (self.values if values is None else values).get(key)
        if value is None:
            raise self.fail(f"{where}{key} is missing; the file is incomplete, download it again")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise self.fail(f"{where}{key} is {value!r}; it must be a number above 0")
        return float(value)

    def flag(self, key: str) -> bool:
        """A boolean; absent is False."""
        value = self.values.get(key)
        if value not in (None, True, False):
            raise self.fail(f"{key} is {value!r}; it must be true or false")
        return bool(value)

    def require(self, key: str, supported: Any) -> None:
        """Refuse a setting that changes the architecture in a way that is not implemented."""
        value = self.values.get(key)
        if value is not None and value != supported:
            raise self.fail(f"{key} is {value!r}; only {supported!r} is supported")


def _mistral_window(config: _Reader) -> int | None:
    if config.values.get("sliding_window") is None:
        return None
    window = config.integer("sliding_window")
    return window if window < config.integer("max_position_embeddings") else None


def _qwen_window(config: _Reader) -> None:
    """Qwen's window applies to some layers only, which is not implemented; off or out of reach is fine."""
    if config.flag("use_sliding_window"):
        window = config.integer("sliding_window", otherwise=4096)
        reach = config.integer("max_position_embeddings")
        if window < reach and config.integer("max_window_layers", otherwise=28) < config.integer("num_hidden_layers"):
            raise config.fail(
                f"use_sliding_window is true with sliding_window {window} below max_position_embeddings {reach}: a "
                "window on some of the layers is not supported; set use_sliding_window to false in a copy of the "
                "checkpoint if its sequences stay within the window"
            )
        return
    layer_types = config.values.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise config.fail(f"layer_types is {layer_types!r}; it must be a list")
    others = sorted({str(t) for t in layer_types} - {"full_attention"})
    if others:
        raise config.fail(f"layer_types contains {', '.join(others)}; only full_attention is supported")


def _qwen3_moe_experts(config: _Reader) -> ExpertShape:
    """Newer transformers write ``num_local_experts`` for what Qwen publishes as ``num_experts``."""
    name = "num_local_experts" if config.values.get("num_experts") is None else "num_experts"
    count, top_k = config.integer(name), config.integer("num_experts_per_tok")
    normalised = config.flag("norm_topk_prob")
    if top_k > count:
        raise config.fail(f"num_experts_per_tok is {top_k}, but {name} is {count}; it cannot exceed it")
    if top_k == 1 and normalised:
        raise config.fail(
            "norm_topk_prob is true with num_experts_per_tok 1: every weight would be 1 and the router could not "
            "learn, which is not supported"
        )
    layers, step = config.integer("num_hidden_layers"), config.integer("decoder_sparse_step", otherwise=1)
    listed = config.values.get("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(type(i) is int and 0 <= i < layers for i in listed):
        raise config.fail(f"mlp_only_layers is {listed!r}; it must be a list of layers, 0 to {layers - 1}")
    dense = tuple(i for i in range(layers) if i in listed or (i + 1) % step)
    if len(dense) == layers:
        raise config.fail("mlp_only_layers and decoder_sparse_step leave no layer with experts; give model_type qwen3")
    return ExpertShape(count, top_k, config.integer("moe_intermediate_size"), normalised, dense)


FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(defaults={"num_key_value_heads": 8, "sliding_window": 4096}, window=_mistral_window),
    "qwen2": Family(defaults={"num_key_value_heads": 32}, qkv_bias=True, window=_qwen_window),
    "qwen3": Family(defaults={"num_key_value_heads": 32, "head_dim": 128}, qk_norm=True, window=_qwen_window),
    "qwen3_moe": Family(
        defaults={"num_key_value_heads": 4, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        qk_norm=True,
        window=_qwen_window,
        experts=_qwen3_moe_experts,
    ),
}
"""Supported values of ``model_type``."""

_DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu"}

_ROPE_PARAMETERS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _read_rope(config: _Reader) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling, from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before)."""
    name = "rope_parameters" if config.values.get("rope_parameters") is not None else "rope_scaling"
    settings = config.values.get(name) or {}
    if not isinstance(settings, Mapping) or any(isinstance(v, Mapping) for v in settings.values()):
        raise config.fail(f"{name} is {settings!r}; it must be one mapping for all layers")
    theta = config.number("rope_theta", settings if "rope_theta" in settings else None)
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        raise config.fail(
            f"{name}.partial_rotary_factor is {settings['partial_rotary_factor']!r}; only 1.0 is supported"
        )
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return theta, None
    if not isinstance(kind, str) or kind not in _ROPE_PARAMETERS:
        supported = ", ".join(("default", *_ROPE_PARAMETERS))
        raise config.fail(f"{name}.rope_type is {kind!r}; supported: {supported}")
    scaling = {key: config.number(key, settings, where=f"{name}.") for key in _ROPE_PARAMETERS[kind]}
    if kind == "llama3" and not scaling["high_freq_factor"] > scaling["low_freq_factor"]:
        raise config.fail(f"{name}.high_freq_factor must exceed low_freq_factor; got {scaling}")
    return theta, {"rope_type": kind, **scaling}


def used_vocabulary(shapes: Mapping[str, ModelShape]) -> int:
    """Entries that the softmax of every role runs over: models of one family pad their vocabularies differently."""
    return min(shape.vocab_size for shape in shapes.values())


def _read_json(path: Path) -> dict[str, Any]:
    if path.parent.is_file():
        raise CheckpointError(f"{path.parent} is a file; give the folder of a model")
    if not path.parent.is_dir():
        raise CheckpointError(f"{path.parent} does not exist{looked_in(path)}; correct the path{download(path.parent)}")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; give the folder of a model, or restore the file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as JSON ({error}); restore the file, or make the folder again"
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object; restore the file, or make the folder again")
    return values


def read_hf_config(directory: str | Path) -> ModelShape:
    """Read and check the architecture of a Hugging Face or converted checkpoint.

    Args:
        directory: the folder that holds ``config.json``.

    Raises:
        CheckpointError: the file is missing or incomplete, the family is not supported, or a setting asks for
            something that is not implemented; the message names the key.
    """
    path = Path(directory) / "config.json"
    values = _read_json(path)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(f"{path}: model_type is {kind!r}; supported: {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[kind]
    config = _Reader(path, {**_DEFAULTS, **family.defaults, **values})
    for key, supported in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        config.require(key, supported)
    if values.get("quantization_config"):
        raise config.fail("quantization_config is set; give the unquantized checkpoint")
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", otherwise=heads)
    if heads % kv_heads:
        raise config.fail(f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
    if config.values.get("head_dim") is None and hidden % heads:
        raise config.fail(
            f"hidden_size {hidden} is not a multiple of num_attention_heads {heads} and head_dim is unset"
        )
    head_dim = config.integer("head_dim", otherwise=max(1, hidden // heads))
    if head_dim % 2:
        raise config.fail(f"head_dim is {head_dim}; rotary positions need an even number")
    rope_theta, rope_scaling = _read_rope(config)
    return ModelShape(
        family=kind,
        num_layers=config.integer("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        max_positions=config.integer("max_position_embeddings"),
        rope_theta=rope_theta,
        norm_eps=config.number("rms_norm_eps"),
        tied=config.flag("tie_word_embeddings"),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        rope_scaling=rope_scaling,
        sliding_window=family.window(config),
        experts=family.experts(config),
    )
