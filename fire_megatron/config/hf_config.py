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
from fire_megatron.config.hf_reader import Reader
from fire_megatron.config.rope import ROPE_TYPES, read_rope


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
    """None, or ``rope_type`` with that type's parameters, all present (:mod:`fire_megatron.config.rope`)."""
    partial_rotary: int | None = None
    """Leading dimensions of a head that are rotated; None when that is all of them."""
    sliding_window: int | None = None
    """Positions a token attends to, itself included; None when that is all of them."""
    full_layers: tuple[int, ...] = ()
    """Layers, from 0, that attend to all positions where the others have the sliding window."""
    experts: ExpertShape | None = None
    """The experts that stand in for the MLP of layers; None in a dense model."""

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return self.head_dim if self.partial_rotary is None else self.partial_rotary

    def has_experts(self, layer: int) -> bool:
        """Whether a layer, from 0, is one of experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

    @property
    def mlp_widths(self) -> dict[str, int]:
        """Width of the gate in every kind of MLP that layers have, by its name in messages."""
        dense = self.experts is None or bool(self.experts.dense_layers)
        widths = {"the MLP": self.ffn} if dense else {}
        return widths | ({"an expert's MLP": self.experts.ffn} if self.experts else {})


_Window = tuple[int | None, tuple[int, ...]]
"""The sliding window, and the layers, from 0, that do not have it."""


@dataclass(frozen=True)
class Family:
    """How one ``model_type`` departs from the shared architecture."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers takes for a key that ``config.json`` leaves out, where it differs from :data:`_DEFAULTS`."""
    qkv_bias: bool = False
    """Biases on q, k, v."""
    qk_norm: bool = False
    """RMSNorm on q and k."""
    window: Callable[[Reader], _Window] = lambda config: (None, ())
    """Reads the sliding window, and the layers without it."""
    rope_types: Mapping[str, str] = field(default_factory=lambda: ROPE_TYPES)
    """What a ``rope_type`` means, by how it is written."""
    partial_rotary: bool = False
    """Whether a part of each head may be rotated."""
    experts: Callable[[Reader], ExpertShape | None] = lambda config: None
    """Reads the mixture of experts."""


def _one_window(config: Reader) -> _Window:
    """A window of all layers. As in transformers' models of these families, ``layer_types`` has no say."""
    return None if config.values["sliding_window"] is None else config.integer("sliding_window"), ()


def _window_if_used(config: Reader) -> _Window:
    return _one_window(config) if config.flag("use_sliding_window") else (None, ())


def _mistral_window(config: Reader) -> _Window:
    """With ``layer_types`` transformers 5 loads another class, Ministral's, which follows it; 4 does not know it."""
    window, _ = _one_window(config)
    return window, () if config.values.get("layer_types") is None else _listed_without_window(config, window)


def _qwen_window(config: Reader) -> _Window:
    """``layer_types`` says which layers have the window; without it, those from ``max_window_layers`` on have."""
    window, _ = _window_if_used(config)
    if config.values.get("layer_types") is not None:
        return window, _listed_without_window(config, window)
    count = config.integer("max_window_layers", least=0)
    return window, tuple(range(min(count, config.integer("num_hidden_layers"))))


def _listed_without_window(config: Reader, window: int | None) -> tuple[int, ...]:
    """The layers that ``layer_types`` leaves without one."""
    layers, types = config.integer("num_hidden_layers"), config.values["layer_types"]
    if not isinstance(types, list) or len(types) != layers:
        raise config.fail(f"layer_types is {types!r}; it must be a list of {layers}, one for each layer")
    others = sorted({str(kind) for kind in types} - {"full_attention", "sliding_attention"})
    if others:
        raise config.fail(
            f"layer_types contains {', '.join(others)}; only full_attention and sliding_attention are supported"
        )
    if window is None and "sliding_attention" in types:
        settings = {key: config.values.get(key) for key in ("use_sliding_window", "sliding_window")}
        raise config.fail(
            f"layer_types contains sliding_attention, but {settings} make no window; correct these, or name "
            "full_attention alone, in a copy of the checkpoint"
        )
    return tuple(i for i, kind in enumerate(types) if kind == "full_attention")


def _qwen3_moe_experts(config: Reader) -> ExpertShape:
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


_QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(defaults={"num_key_value_heads": 8, "sliding_window": 4096}, window=_mistral_window),
    "phi3": Family(
        defaults={"rms_norm_eps": 1e-5, "sliding_window": None, "original_max_position_embeddings": 4096},
        window=_one_window,
        # As transformers takes its older names.
        rope_types={"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"},
        partial_rotary=True,
    ),
    "qwen2": Family(defaults=_QWEN, qkv_bias=True, window=_qwen_window),
    "qwen3": Family(defaults=_QWEN | {"head_dim": 128}, qk_norm=True, window=_qwen_window),
    "qwen3_moe": Family(
        defaults={
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        qk_norm=True,
        window=_window_if_used,
        experts=_qwen3_moe_experts,
    ),
}
"""Supported values of ``model_type``."""

_DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu"}


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


def read_hf_config(directory: str | Path, *, quantized: bool = False) -> ModelShape:
    """Read and check the architecture of a Hugging Face or converted checkpoint.

    Args:
        directory: the folder that holds ``config.json``.
        quantized: whether its weights may be quantised, by a reader that knows how.

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
    config = Reader(path, {**_DEFAULTS, **family.defaults, **values})
    if config.values["hidden_act"] == "swish":  # transformers' other name of it
        config.values["hidden_act"] = "silu"
    required = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "per_layer_config": None}
    for key, supported in required.items():
        config.require(key, supported)
    if values.get("quantization_config") and not quantized:
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
    rope = read_rope(config, head_dim=head_dim, types=family.rope_types, partial=family.partial_rotary)
    layers, (window, full) = config.integer("num_hidden_layers"), family.window(config)
    if window is not None and (window >= rope.positions or len(full) == layers):
        window = None  # reaches every position, or is nowhere
    return ModelShape(
        family=kind,
        num_layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        max_positions=rope.positions,
        rope_theta=rope.theta,
        norm_eps=config.number("rms_norm_eps"),
        tied=config.flag("tie_word_embeddings"),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        rope_scaling=rope.scaling,
        partial_rotary=None if rope.rotary_dim == head_dim else rope.rotary_dim,
        sliding_window=window,
        full_layers=() if window is None else full,
        experts=family.experts(config),
    )
