"""Conversion streams: its memory does not grow with the model.

Measured on 191 MB of bfloat16 weights whose largest tensor is 16 MB: 25 MB over the imports there; back with shards of
20 MB, 62 MB (a shard, the tensors that wait for the next one, and what malloc keeps). Memory-mapped pages count:
when every file stayed mapped until the end, the way there took 200 MB.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from processes import call
from safetensors.torch import save_file

from fire_megatron.checkpoint.maps import tensor_map
from fire_megatron.config.hf_config import read_hf_config

SHARD_GB = 0.02
DENSE = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 7,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 8000,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
EXPERTS = {
    **DENSE,
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "num_experts": 30,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 512,
}
"""The stacked experts of a layer are one tensor of 63 MB."""

PROBE = """
import json, re, runpy, sys
from pathlib import Path
import fire_megatron.checkpoint.convert

def resident(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = resident("VmRSS")
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps(resident("VmHWM") - before))
"""
"""Runs a tool after its imports and prints by how many bytes its peak resident memory rose meanwhile."""


def write_model(folder, config):
    """Weights of no meaning; returns their bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {
        name: shape
        for tensor in tensor_map(read_hf_config(folder))
        for name, shape in zip(tensor.sources, tensor.shapes, strict=True)
    }
    weights = {name: torch.full(shape, 0.5, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    return sum(tensor.numel() * tensor.element_size() for tensor in weights.values())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peak memory from Linux' /proc")
@pytest.mark.parametrize("config", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_peak_memory_is_a_part_of_the_model(config, tmp_path):
    size = write_model(tmp_path / "hf", config)
    assert size > 190e6

    def growth(*arguments):
        return int(call("-c", PROBE, "tools/convert.py", *arguments).splitlines()[-1])

    there = growth("hf-to-megatron", "--hf", tmp_path / "hf", "--out", tmp_path / "megatron")
    back = growth(
        "megatron-to-hf", "--checkpoint", tmp_path / "megatron", "--out", tmp_path / "back", "--shard-gb", SHARD_GB
    )
    assert 1e6 < there < 0.25 * size, f"{there / 1e6:.0f} MB"
    assert SHARD_GB * 1e9 < back < 0.6 * size, f"{back / 1e6:.0f} MB"
