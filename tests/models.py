"""Small random models of every family, in Hugging Face and in megatron form, for the tests that need weights."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 301
"""Not a multiple of any padding, so that every model here has padded columns."""
EOS = 5

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
_SMALL = {
    **SIZES,
    "initializer_range": 0.15,
    "eos_token_id": EOS,
    "bos_token_id": 1,
    "pad_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ORIGINAL = 16
"""Longest row of the models below before their frequencies are scaled."""
_YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.4, 1.5],
    "long_factor": [1.0, 1.3, 2.0, 4.0, 9.0, 20.0],
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama3-tied": ("Llama", {"tie_word_embeddings": True, "rope_parameters": _LLAMA3}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": False, "head_dim": 24}),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "tie_word_embeddings": False,
            "head_dim": 24,
            "moe_intermediate_size": 40,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
    ),
    "qwen3-moe-mixed": (
        "Qwen3Moe",
        {
            "tie_word_embeddings": True,
            "moe_intermediate_size": 40,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "norm_topk_prob": False,
            "mlp_only_layers": [1],
        },
    ),
    "mistral": ("Mistral", {"tie_word_embeddings": False, "sliding_window": None}),
    "mistral-window": ("Mistral", {"tie_word_embeddings": False, "sliding_window": 7}),
    "qwen2-windows": (
        "Qwen2",
        {
            "tie_word_embeddings": False,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
            "rope_parameters": _YARN,
        },
    ),
    "phi3": (
        "Phi3",
        {
            "tie_word_embeddings": False,
            "original_max_position_embeddings": ORIGINAL,
            "partial_rotary_factor": 0.75,
            "rope_parameters": _LONGROPE,
        },
    ),
    "llama-dynamic": (
        "Llama",
        {
            "tie_word_embeddings": False,
            "max_position_embeddings": ORIGINAL,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0},
        },
    ),
}


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    yield
    torch.set_rng_state(state)


def in_release(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as the installed transformers has them: before 5, scaling and base of the frequencies were two."""
    import transformers

    if int(transformers.__version__.split(".")[0]) >= 5 or "rope_parameters" not in settings:
        return settings
    scaling = dict(settings["rope_parameters"])
    kind, base = scaling.pop("rope_type", "default"), scaling.pop("rope_theta", 10000.0)
    old = {"rope_theta": base, "rope_scaling": None if kind == "default" else {"type": kind, **scaling}}
    return {key: value for key, value in settings.items() if key != "rope_parameters"} | old


def stacked_experts(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The experts of a layer in one tensor for each matrix, as transformers 5 has them in memory; 4 has them one by
    one, as both write them."""
    found = [re.fullmatch(r"(.*\.experts)\.0\.down_proj\.weight", name) for name in weights]
    stacked = {name: tensor for name, tensor in weights.items() if not re.search(r"\.experts\.\d+\.", name)}
    for at in [match[1] for match in found if match]:
        count = len({name.removeprefix(at).split(".")[1] for name in weights if name.startswith(f"{at}.")})
        gate, up, down = (
            torch.stack([weights[f"{at}.{j}.{part}_proj.weight"] for j in range(count)])
            for part in ("gate", "up", "down")
        )
        stacked |= {f"{at}.gate_up_proj": torch.cat([gate, up], dim=1), f"{at}.down_proj": down}
    return stacked


def make_hf(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random transformers model of a family; norms and biases are random too, so that none can be forgotten."""
    import transformers

    prefix, settings = FAMILIES[name]
    config = getattr(transformers, f"{prefix}Config")(**in_release({**_SMALL, **settings, **changes}))
    with _seeded(seed):
        model = getattr(transformers, f"{prefix}ForCausalLM")(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def write_tokenizer(folder: Path) -> None:
    """A word-level tokenizer over the small vocabulary: token ``w17`` is id 17; ``<eos>`` ends a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(VOCABULARY)}
    del vocabulary[f"w{EOS}"]
    vocabulary["<eos>"] = EOS
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="w0").save_pretrained(folder)


def save_hf(name: str, folder: Path, **options: Any) -> Any:
    """Write a model with its tokenizer as a Hugging Face folder; returns the model."""
    model = make_hf(name, **options)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def save_megatron(name: str, folder: Path, **options: Any) -> Any:
    """Write a model as a converted checkpoint; returns the transformers model."""
    from fire_megatron.checkpoint.convert import hf_to_megatron

    hf = folder.with_name(folder.name + "-hf")
    model = save_hf(name, hf, **options)
    hf_to_megatron(hf, folder)
    return model


def write_prompts(path: Path, label: str, count: int, *, seed: int = 0) -> Path:
    """A prompt file of random words of the small vocabulary, 3 to 12 words each."""
    generator = torch.Generator().manual_seed(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            length = int(torch.randint(3, 13, (1,), generator=generator))
            words = torch.randint(6, VOCABULARY, (length,), generator=generator).tolist()
            file.write(json.dumps({"problem": " ".join(f"w{w}" for w in words), "label": label}) + "\n")
    return path
