"""Models of Transformer Engine's layers take the very checkpoints that megatron-core's own layers take."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import transformers
from models import FAMILIES, SIZES
from processes import call

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)

CASES = [
    # family, tensor, context, expert, one expert after the other; class of the experts
    ("llama3-tied", 2, 1, 1, False, None),
    ("qwen2", 1, 2, 1, False, None),
    ("mistral-window", 1, 2, 1, False, None),
    ("qwen2-windows", 1, 2, 1, False, None),
    ("qwen2", 4, 1, 1, False, None),  # of two key/value heads
    ("qwen3", 2, 2, 1, False, None),
    ("qwen3-moe", 1, 1, 1, False, "TEGroupedMLP"),
    ("qwen3-moe", 2, 1, 2, False, "TEGroupedMLP"),
    ("qwen3-moe", 1, 2, 2, False, "TEGroupedMLP"),
    ("qwen3-moe", 1, 1, 2, True, "SequentialMLP"),
    ("qwen3-moe-mixed", 2, 1, 1, False, "TEGroupedMLP"),
]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Of all cases, by one process."""
    folder = tmp_path_factory.mktemp("te-names")
    for family in {case[0] for case in CASES}:
        prefix, settings = FAMILIES[family]
        getattr(transformers, f"{prefix}Config")(**{**SIZES, **settings}).save_pretrained(folder / family)
    cases = json.dumps([(str(folder / family), *layout) for family, *layout, _ in CASES])
    return json.loads(call(Path(__file__).with_name("te_names.py"), read=cases).splitlines()[-1])


@pytest.mark.parametrize("number", range(len(CASES)), ids=str)
def test_same_tensors_as_the_checkpoint(reports, number):
    (family, tensor, context, *_, experts), report = CASES[number], reports[number]
    assert "TELayerNormColumnParallelLinear" in report["layers"], "these are not Transformer Engine's layers"
    assert experts is None or {experts, "Router"} <= {*report["layers"]}
    assert report["found"] == report["wanted"]
    windows = {"mistral-window": [True] * 4, "qwen2-windows": [False, True, True, True]}.get(family, [False] * 4)
    assert report["windows"] == [[6, 0] if window else [-1, 0] for window in windows]
    assert report["communications"] == ["all_gather" if window else "p2p" for window in windows]
    # Rows of 14 and 6 tokens, padded to multiples of 4 where two ranks share them; the kernel is told of whole rows.
    boundaries = [0, 14, 20] if context == 1 else [0, 16, 24]
    assert report["attention"] == {
        "class": "TEAttention",
        "context_ranks": None if context == 1 else [0, tensor],
        "mask": "padding_causal",
        "boundaries": boundaries,
        "one_tensor": True,
        "longest": boundaries[1],
        "out": [boundaries[-1] // context, 32],
        "seen_by_megatron": 1,
    }


def test_chunks_are_those_that_transformer_engine_expects():
    """Its own function that cuts packs for context ranks, on a CPU, gives the tokens that ours gives."""
    code = """
import itertools, torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformer_engine.pytorch.attention.dot_product_attention.context_parallel import get_batch_on_this_cp_rank
from fire_megatron.data.packing import zigzag
dist.init_process_group("fake", rank=1, world_size=3, store=FakeStore())
starts = [0, 12, 42, 48]
tokens, labels, positions = (torch.arange(48) + 100 * i for i in range(3))
theirs = get_batch_on_this_cp_rank(torch.tensor(starts), tokens[None], labels[None], positions[None], dist.group.WORLD)
ours = zigzag(starts, 3, 1)
assert len(ours) == 16 and torch.equal(theirs[0].flatten(), tokens[ours]), (theirs, ours)
"""
    call("-c", code)
