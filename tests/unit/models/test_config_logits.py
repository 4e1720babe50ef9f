"""Every way of writing rotary positions and sliding windows into a config.json means to us what it means to
transformers: the same logits, for rows within and beyond the context that the frequencies were made for."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from models import SIZES, VOCABULARY, write_tokenizer

from fire_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf
from fire_megatron.checkpoint.loading import load_weights
from fire_megatron.config.hf_config import read_hf_config
from fire_megatron.config.schema import StudentConfig
from fire_megatron.data.packing import pack_rows
from fire_megatron.models.build import build_model
from fire_megatron.models.kv_cache import KVCache
from fire_megatron.models.packed import packed_seq_params
from fire_megatron.platform.device import Device

NEWEST = int(transformers.__version__.partition(".")[0]) >= 5
ORIGINAL = 16
"""Positions before scaling."""
LENGTHS = (3, ORIGINAL, ORIGINAL + 1, 45)
TOLERANCE = 1e-5
"""Of the largest logit."""
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": True}
THETA = {"rope_theta": 500.0}
"""Low, so that 16 positions are many turns of some frequencies and few of others."""
YARN = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LONG = {"short_factor": [1.0 + i / 10 for i in range(8)], "long_factor": [1.0 + i * i for i in range(8)]}
PHI3 = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1.0, 1.5, 2.0, 4.0, 9.0, 20.0]}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL}
SHORT = {"max_position_embeddings": ORIGINAL}
OLDEST = {"original_max_position_embeddings": ORIGINAL} if NEWEST else {}
"""What transformers 5 asks of a Phi-3 of before it was called ``longrope``, and 4 refuses."""
TOP = {"original_max_position_embeddings": ORIGINAL, "max_position_embeddings": 8 * ORIGINAL}


def old(kind, *, key="rope_type", **settings):
    """As transformers 4 writes it."""
    return {**THETA, "rope_scaling": {key: kind, **settings}}


def new(kind, **settings):
    """As transformers 5 writes it."""
    return {"rope_parameters": {"rope_type": kind, **THETA, **settings}}


PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}
ROPES = {
    "linear": old("linear", key="type", factor=4.0),
    "llama3": old("llama3", **LLAMA3),
    "yarn": old("yarn", **YARN),
    "yarn, oldest form": old("yarn", key="type", **YARN),
    "yarn beside the new form": PLAIN | old("yarn", **YARN),
    "yarn beside the new form, without a base": PLAIN | {"rope_scaling": {"rope_type": "yarn", **YARN}},
    "yarn of all positions": SHORT | old("yarn", factor=4.0),
    "yarn with an attention factor": old("yarn", **YARN, attention_factor=1.3),
    "yarn as DeepSeek's": old("yarn", **YARN, mscale=1.0, mscale_all_dim=0.6),
    "yarn with other bounds": old("yarn", **YARN, beta_fast=4, beta_slow=0.5),
    "yarn with exact bounds": old("yarn", **YARN, beta_fast=4, beta_slow=0.5, truncate=False),
    "yarn of less than one": old("yarn", **YARN | {"factor": 0.5}),
    "dynamic": SHORT | old("dynamic", factor=3.0),
    "dynamic beside the new form": SHORT | PLAIN | old("dynamic", key="type", factor=3.0),
    "longrope": TOP | old("longrope", **LONG),
    "longrope of all positions": SHORT | old("longrope", factor=8.0, **LONG),
    "longrope with an attention factor": TOP | old("longrope", attention_factor=1.1, **LONG),
}
NEW_ROPES = {
    "yarn, new form": new("yarn", **YARN),
    "yarn, new form, its base at the top": {**THETA, "rope_parameters": {"rope_type": "yarn", **YARN}},
    "yarn beside an empty old form": {**new("yarn", **YARN), "rope_scaling": {}},
    "yarn with its base in the old form": {**THETA, "rope_scaling": {"rope_type": "yarn", "rope_theta": 77.0, **YARN}},
    "yarn, the original at the top too": TOP | old("yarn", **YARN | {"original_max_position_embeddings": 99}),
    "dynamic, new form": SHORT | new("dynamic", factor=3.0),
    "longrope, new form": new("longrope", original_max_position_embeddings=ORIGINAL, **LONG),
    "longrope with a factor of its own": TOP | new("longrope", factor=3.0, **LONG),
    "llama3 of all positions": SHORT | new("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
    "llama3, the original at the top": TOP | new("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
}
"""Forms that only transformers 5 reads so."""
WINDOW = {"use_sliding_window": True, "sliding_window": 7}
FULL, SLIDING = "full_attention", "sliding_attention"
WINDOWS = {
    "none of the layers": WINDOW | {"max_window_layers": 4},
    "all of the layers": WINDOW | {"max_window_layers": 0},
    "some of the layers": WINDOW | {"max_window_layers": 3},
    "listed as none": WINDOW | {"max_window_layers": 0, "layer_types": [FULL] * 4},
    "listed as all": WINDOW | {"max_window_layers": 4, "layer_types": [SLIDING] * 4},
    "listed as some": WINDOW | {"layer_types": [SLIDING, FULL, FULL, SLIDING]},
    "not used": {"use_sliding_window": False, "sliding_window": 7, "max_window_layers": 0},
    "null": {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
    "reaches all": WINDOW | {"sliding_window": 512, "max_window_layers": 0},
}
CASES = [("llama", name, changes) for name, changes in ROPES.items()]
CASES += [("llama", name, changes) for name, changes in NEW_ROPES.items() if NEWEST]
QWEN = ("qwen2", "qwen3", "qwen3_moe")
CASES += [(kind, "yarn", {"head_dim": 16} | PLAIN | ROPES["yarn"]) for kind in ("mistral", *QWEN)]
CASES += [(kind, f"window: {name}", window) for kind in QWEN for name, window in WINDOWS.items()]
CASES += [
    ("qwen3", "yarn and windows", ROPES["yarn"] | WINDOWS["listed as some"]),
    ("qwen3", "dynamic and windows", ROPES["dynamic"] | WINDOWS["listed as some"]),
    ("mistral", "window: beyond the positions before scaling", SHORT | {"sliding_window": 20} | ROPES["linear"]),
    ("mistral", "window: listed", {"sliding_window": 7, "layer_types": [SLIDING] * 4, "head_dim": 16}),
    ("phi3", "part of a head", {"partial_rotary_factor": 0.5}),
    ("phi3", "an odd part of a head", {"partial_rotary_factor": 0.7}),
    ("phi3", "longrope of a part", {**TOP, "partial_rotary_factor": 0.75} | old("longrope", key="type", **PHI3)),
    ("phi3", "its oldest name", {**TOP, "sliding_window": 9} | old("su", key="type", **LONG, **OLDEST)),
]

if NEWEST:  # before, layer_types meant nothing to it
    CASES += [
        ("mistral", f"window: {name}", {"head_dim": 16, **WINDOWS[name]})
        for name in ("listed as none", "listed as some")
    ]


def draw_rows():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def make_folder(folder, kind, changes):
    """Random weights beside just this config.json; returns it."""
    values = {"model_type": kind, **SIZES, **(EXPERTS if kind == "qwen3_moe" else {}), **changes}
    values |= {"initializer_range": 0.15, "pad_token_id": None, "eos_token_id": 5}
    folder.mkdir()
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    model.save_pretrained(folder)
    path.write_text(json.dumps(values))
    write_tokenizer(folder)
    return values


def transformers_model(folder):
    """A fresh one each time: with some scalings it remembers the longest row that it has seen."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def transformers_logits(folder, row):
    """[L, V] of a row by itself."""
    with torch.no_grad():
        return transformers_model(folder)(row[None]).logits[0]


def our_model(folder, grid):
    role = StudentConfig(checkpoint=str(folder), vocab_multiple=1)
    model = build_model(read_hf_config(folder), role, grid, device=Device("cpu"))
    load_weights(model, folder, grid=grid)
    return model.eval()


def our_logits(model, rows):
    """[L, V] of each row, from one pack."""
    pack = pack_rows(rows, [row[:0] for row in rows], range(len(rows)), multiple=7, device=torch.device("cpu"))
    with torch.no_grad():
        logits = model(pack.token_ids, pack.position_ids, packed=packed_seq_params(pack))
    return logits[: sum(LENGTHS), :VOCABULARY].split([len(row) for row in rows])


def apart(ours, theirs):
    """Relative to the largest logit."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize(("kind", "name", "changes"), CASES, ids=[f"{kind}, {name}" for kind, name, _ in CASES])
def test_logits_are_those_of_transformers(kind, name, changes, grid, tmp_path):
    values = make_folder(tmp_path / "hf", kind, changes)
    hf_to_megatron(tmp_path / "hf", tmp_path / "converted")
    rows = draw_rows()
    for row, logits in zip(rows, our_logits(our_model(tmp_path / "converted", grid), rows), strict=True):
        assert apart(logits, transformers_logits(tmp_path / "hf", row)) < TOLERANCE, len(row)
    megatron_to_hf(tmp_path / "converted", tmp_path / "exported")
    written = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert {key: written[key] for key in values} == values
    before, after = (transformers_logits(tmp_path / name, rows[3]) for name in ("hf", "exported"))
    assert torch.equal(before, after)


DECODED = ["yarn", "dynamic", "longrope"]


def decode(model, row, prompt):
    """[L - prompt + 1, V] logits of one row whose first tokens are a prompt and whose others follow one at a time."""
    cache, out = KVCache(1, len(row)), []
    with torch.no_grad(), model.cached(cache):
        cache.begin_prefill([0], [prompt])
        pack = pack_rows([row[:prompt]], [row[:0]], [0], multiple=1, device=torch.device("cpu"))
        ends = torch.tensor([prompt - 1])
        out.append(model(pack.token_ids, pack.position_ids, packed=packed_seq_params(pack), select=ends))
        for token in row[prompt:]:
            cache.begin_decode(1, cache.max_length)
            out.append(model(token[None, None], cache.lengths[:1, None]))
            cache.end_decode()
    return torch.cat(out)[:, :VOCABULARY]


def transformers_decode(folder, row, prompt):
    """The same, with its own cache."""
    model, out, cache = transformers_model(folder), [], None
    name = "cache" if "cache" in model.forward.__code__.co_varnames else "past_key_values"
    with torch.no_grad():
        for part in (row[:prompt], *row[prompt:, None]):
            answer = model(part[None], use_cache=True, **({} if cache is None else {name: cache}))
            cache = getattr(answer, name, None) or answer.past_key_values
            out.append(answer.logits[:, -1])
    return torch.cat(out)


@pytest.mark.parametrize("prompt", [1, 10, 20])
@pytest.mark.parametrize("name", DECODED)
def test_decoding_a_row_by_itself_is_that_of_transformers(name, prompt, grid, tmp_path):
    """Keys keep the angles that they had when they came."""
    make_folder(tmp_path / "hf", "llama", ROPES[name])
    hf_to_megatron(tmp_path / "hf", tmp_path / "converted")
    row = draw_rows()[-1]
    ours = decode(our_model(tmp_path / "converted", grid), row, prompt)
    assert apart(ours, transformers_decode(tmp_path / "hf", row, prompt)) < TOLERANCE


@pytest.mark.parametrize("longest", [12, ORIGINAL, ORIGINAL + 1, 60])
@pytest.mark.parametrize("name", DECODED)
def test_one_length_for_all_rows_makes_decoding_and_scoring_agree(name, longest, grid, tmp_path):
    make_folder(tmp_path / "hf", "llama", ROPES[name])
    hf_to_megatron(tmp_path / "hf", tmp_path / "converted")
    model, rows = our_model(tmp_path / "converted", grid), draw_rows()
    by_itself = our_logits(model, rows)
    with model.rotary_angles.fixed(longest):
        fixed = our_logits(model, rows)
        for row, scored in zip(rows, fixed, strict=True):
            assert apart(decode(model, row, 2), scored[1:]) < TOLERANCE, len(row)
    agree = [apart(ours, theirs) < TOLERANCE for ours, theirs in zip(fixed, by_itself, strict=True)]
    beyond = [length > ORIGINAL for length in LENGTHS]
    if name == "yarn":
        assert all(agree)
    elif name == "longrope" or longest <= ORIGINAL:  # rows of the same side
        assert agree == [side == (longest > ORIGINAL) for side in beyond]
    for ours, theirs in zip(our_logits(model, rows), by_itself, strict=True):
        assert apart(ours, theirs) < TOLERANCE, "afterwards each row has its own again"
