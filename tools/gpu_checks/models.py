"""Models of real shapes with random weights, made on the device, and rows for them."""

from __future__ import annotations

import contextlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fire_megatron.config.hf_config import ModelShape, read_hf_config
from fire_megatron.config.schema import FP8Config, PrecisionConfig, StudentConfig
from fire_megatron.data.records import Prompt
from fire_megatron.models.build import build_model
from fire_megatron.models.gpt import FireGPT
from fire_megatron.parallel.grid import GridFactory, Layout, ModelGrid
from fire_megatron.platform.launch import World, start, stop
from gpu_checks.check import Context

_QWEN3 = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 128,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "initializer_range": 0.02,
}
_TOY = _QWEN3 | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}


def _qwen3(hidden: int, ffn: int, layers: int, heads: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads}
    return _QWEN3 | sizes


CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "Qwen3-0.6B": _qwen3(1024, 3072, 28, 16),
    "Qwen3-1.7B": _qwen3(2048, 6144, 28, 16),
    "Qwen3-4B": _qwen3(2560, 9728, 36, 32),
    "toy": _TOY,
    "toy-heads-of-128": _TOY | {"head_dim": 128, "vocab_size": 1024},
}
"""``config.json`` of models, by name; published shapes, and what stands for them on a CPU."""
ONE_LAYER = "-of-1-layer"
"""After a name: the same with one layer."""


def shape_folder(name: str, context: Context) -> Path:
    """A folder with a model's ``config.json``."""
    folder = context.folder / "shapes" / name
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIGS[name.removesuffix(ONE_LAYER)] | ({"num_hidden_layers": 1} if name.endswith(ONE_LAYER) else {})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@dataclass(frozen=True)
class Here:
    """A world of this process alone."""

    world: World
    grid: ModelGrid
    context: Context

    @property
    def dtype(self) -> str:
        """Of models: bfloat16, also on a CPU."""
        return "bfloat16"

    def shape(self, name: str) -> ModelShape:
        """Of one of :data:`CONFIGS`."""
        return read_hf_config(shape_folder(name, self.context))

    def model(
        self, name: str, *, dtype: str = "bfloat16", spec: str = "auto", fp8: FP8Config | None = None, sharp: float = 1
    ) -> FireGPT:
        """A model of a shape. Weights depend on seed and names alone: models of one name that differ in number format
        or layer spec have the same, rounded to bfloat16.

        Args:
            name: of :data:`CONFIGS`.
            dtype: of weights and activations.
            spec: layer spec.
            fp8: of the linear layers.
            sharp: standard deviation of the logits.
        """
        role = StudentConfig(checkpoint=name, layer_spec=spec, precision=PrecisionConfig(dtype=dtype, fp8=fp8))
        shape = self.shape(name)
        model = build_model(shape, role, self.grid, device=self.world.device)
        fill(model, sharp / (0.02 * math.sqrt(shape.hidden)))
        return model


@contextlib.contextmanager
def alone(context: Context) -> Iterator[Here]:
    """Within the context, this process is a world of one rank."""
    # Toys are too small to share a product between threads.
    world = start(context.device, timeout=600, threads=0 if context.gpu else 1)
    try:
        yield Here(world, GridFactory(timeout=600).grid(Layout()), context)
    finally:
        stop()


def _plain_name(name: str) -> str:
    """Transformer Engine's layers hold the norm before them, which has a name of its own in the local ones."""
    name = name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
    return name.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")


@torch.no_grad()
def fill(model: FireGPT, final_scale: float) -> None:
    """Normal weights of deviation 0.02, norms of 1, and a final norm that scales what the output layer reads."""
    for name, parameter in model.named_parameters():
        plain = _plain_name(name)
        if parameter.dim() == 1:
            parameter.fill_(final_scale if plain.endswith("final_layernorm.weight") else 1.0)
            continue
        generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(plain.encode()))
        values = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
        parameter.copy_(values.normal_(0, 0.02, generator=generator).bfloat16())


def parameter_bytes(model: torch.nn.Module) -> int:
    """Of its memory."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def ragged(count: int, shortest: int, longest: int) -> list[int]:
    """So many lengths, evenly spread and in no order."""
    spread = [shortest + (longest - shortest) * i // max(count - 1, 1) for i in range(count)]
    return [spread[(7 * i) % count] for i in range(count)] if count % 7 else spread


def prompts_of(lengths: Sequence[int], vocabulary: int, label: str = "t") -> list[Prompt]:
    """Random prompts of these lengths."""
    draw = torch.Generator().manual_seed(0)
    return [
        Prompt(i, label, tuple(torch.randint(vocabulary, (n,), generator=draw).tolist()), "")
        for i, n in enumerate(lengths)
    ]
