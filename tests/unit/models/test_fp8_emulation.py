"""A linear layer's products against dense float64 on separately rounded values, and a model's layers in FP8."""

from __future__ import annotations

import pytest
import torch
from models import VOCABULARY, save_megatron

from fire_megatron.checkpoint.loading import load_weights
from fire_megatron.config.hf_config import read_hf_config
from fire_megatron.config.schema import FP8Config, PrecisionConfig, StudentConfig
from fire_megatron.data.packing import pack_rows
from fire_megatron.models.build import build_model
from fire_megatron.models.fp8.emulation import EmulatedFP8, Scales
from fire_megatron.models.fp8.linear import EmulatedLinear
from fire_megatron.models.fp8.quantize import E4M3, E5M2, quantize, quantize_blocks
from fire_megatron.models.kv_cache import KVCache
from fire_megatron.models.packed import packed_seq_params
from fire_megatron.platform.device import Device

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("grid")
TENSORWISE = FP8Config(recipe="tensorwise", emulate=True)
RECIPES = [
    TENSORWISE.replace(recipe=recipe, format=fmt)
    for recipe in ("tensorwise", "delayed", "blockwise", "mxfp8")
    for fmt in ("hybrid", "e4m3")
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("fp8") / "m"
    save_megatron("qwen3-moe-mixed", path, num_hidden_layers=3)
    return path


def make(checkpoint, grid, fp8, *, dtype="float32", megatron=None):
    precision = PrecisionConfig(dtype=dtype, fp8=fp8)
    role = StudentConfig(checkpoint=str(checkpoint), vocab_multiple=4, precision=precision, megatron=megatron or {})
    model = build_model(read_hf_config(checkpoint), role, grid, device=Device("cpu"))
    load_weights(model, checkpoint, grid=grid)
    return model


def rounded(x, fmt, config, *, along, weight=False):
    """float64 values of a matrix rounded for a sum along a dimension, by the recipe's definition."""
    if config.recipe == "blockwise":
        block = (128, 128) if weight else (1, 128) if along == 1 else (128, 1)
        return quantize_blocks(x, fmt, block).values().double()
    if config.recipe == "mxfp8":
        return quantize_blocks(x, fmt, (1, 32) if along == 1 else (32, 1), mx=True).values().double()
    margin = 2**config.margin if config.recipe == "delayed" else 1
    return quantize(x, fmt, torch.finfo(fmt).max / x.abs().max() / margin).values().double()


def tiny_product(config):
    """The product of a lone layer, and what remembers for it."""
    emulated = EmulatedFP8([], config, num_layers=1, ep_rank=0)
    if config.recipe == "delayed":
        emulated.scales = Scales(["a"], config)
    return emulated, EmulatedLinear(emulated._rounding("a", config))


@pytest.mark.parametrize("config", [*RECIPES, RECIPES[2].replace(margin=2)], ids=lambda c: f"{c.recipe}-{c.format}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_of_rounded_operands(config, dtype, grid):
    generator = torch.Generator().manual_seed(5)
    x = (torch.randn(37, 2, 160, generator=generator) * 3).to(dtype).requires_grad_()
    w = (torch.randn(144, 160, generator=generator) * 0.02).to(dtype).requires_grad_()
    b = torch.randn(144, generator=generator).to(dtype).requires_grad_()
    dy = (torch.randn(37, 2, 144, generator=generator) * 1e-6).to(dtype)
    emulated, product = tiny_product(config)
    if emulated.scales is not None:
        y = product(x, w)
        assert torch.equal(y, (x.float() @ w.float().t()).to(dtype)), "nothing seen yet"
        y.backward(dy)
        emulated.end_update(group=grid.pg.tp_dp_cp)
        x.grad = w.grad = None
    y = product(x, w, b)
    y.backward(dy)

    back = E5M2 if config.format == "hybrid" else E4M3
    x2, w2, dy2 = x.detach().flatten(0, 1).float(), w.detach().float(), dy.flatten(0, 1).float()
    expected_y = rounded(x2, E4M3, config, along=1) @ rounded(w2, E4M3, config, along=1, weight=True).t()
    expected_x = rounded(dy2, back, config, along=1) @ rounded(w2, E4M3, config, along=0, weight=True)
    expected_w = rounded(dy2, back, config, along=0).t() @ rounded(x2, E4M3, config, along=0)
    close = 3e-6 if dtype == torch.float32 else 2**-8
    got_y = (y - b).detach() if dtype == torch.float32 else product(x, w).detach()
    for got, expected in ((got_y.flatten(0, 1), expected_y), (x.grad.flatten(0, 1), expected_x), (w.grad, expected_w)):
        assert got.dtype == dtype and (got.double() - expected).abs().max() <= close * expected.abs().max()
    exact_w = dy2.double().t() @ x2.double()
    assert (expected_w - exact_w).norm() > 0.01 * exact_w.norm(), "rounding shows"
    assert torch.allclose(b.grad.float(), dy2.sum(0), rtol=0.02, atol=1e-7)


def test_a_delayed_scale_follows_its_history(grid):
    config = FP8Config(recipe="delayed", amax_history=3, emulate=True)
    for algorithm in ("max", "most_recent"):
        scales = Scales(["a", "b"], config.replace(amax_algorithm=algorithm))
        seen = [4.0, 2.0, 0.0, 1.0, float("inf"), 8.0]
        used = []
        for peak in seen:
            scales.record("a", "input", torch.tensor(peak / 2))
            scales.record("a", "input", torch.tensor(peak))
            scales.record("a", "input", torch.tensor(peak / 4))
            scales.update(group=grid.pg.tp_dp_cp)
            used.append(448 / float(scales.scale("a", "input")))
        # Three back with `max`; infinity is in the history for three updates, in which the last scale stays.
        expected = {"max": [4, 4, 4, 2, 2, 2], "most_recent": [4, 2, 2, 1, 1, 8]}[algorithm]
        assert used == expected
        assert scales.scale("a", "weight") is None and scales.scale("b", "input") is None
        assert scales.history_hM3.shape == (3, 2, 3)


def test_scales_continue_from_their_state(grid):
    config = FP8Config(recipe="delayed", amax_history=4, emulate=True)
    first = Scales(["a", "b"], config)
    for peak in (4.0, 1.0, 2.0):
        first.record("a", "gradient", torch.tensor(peak))
        first.update(group=grid.pg.tp_dp_cp)
    second = Scales(["b", "a", "new"], config)
    second.load(first.state() | {"elsewhere": first.state()["a"]})
    shorter = Scales(["a"], config.replace(amax_history=2))
    shorter.load(first.state())
    for scales in (first, second, shorter):
        scales.update(group=grid.pg.tp_dp_cp)
        scales.update(group=grid.pg.tp_dp_cp)
    assert torch.equal(first.scale("a", "gradient"), second.scale("a", "gradient"))
    assert first.scale("a", "gradient") == 57344 / 2, "2 and 1 are left in the history of 4"
    assert shorter.scale("a", "gradient") == 57344 / 2, "nothing is left in the history of 2"
    assert second.scale("new", "gradient") is None


def test_layers_in_fp8(checkpoint, grid):
    model = make(checkpoint, grid, TENSORWISE)
    dense = [f"mlp.{name}" for name in ("linear_fc1", "linear_fc2")]
    experts = [f"mlp.experts.local_experts.{i}.{name}" for i in range(6) for name in ("linear_fc1", "linear_fc2")]
    attention = [f"self_attention.{name}" for name in ("linear_qkv", "linear_proj")]
    expected = {f"{i}.{name}" for i in range(3) for name in (attention + (dense if i == 1 else experts))}
    assert set(model.emulated_fp8.layers) == expected
    assert {id(m) for m in model.modules() if "_forward_impl" in vars(m)} == {
        id(m) for m in model.emulated_fp8.layers.values()
    }
    kept = make(checkpoint, grid, TENSORWISE.replace(first_last_bf16=1))
    assert set(kept.emulated_fp8.layers) == {name for name in expected if name.startswith("1.")}
    assert make(checkpoint, grid, None).emulated_fp8 is None
    assert model.config.fp8 is None


def packs():
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(6, VOCABULARY, (n,), generator=generator) for n in (9, 14, 5)]
    return pack_rows([row[:3] for row in rows], [row[3:] for row in rows], [0, 1, 2], multiple=1, device=CPU)


def run(model, *, backward=True):
    """Final hidden states of a pack, and every gradient."""
    pack = packs()
    with torch.enable_grad() if backward else torch.no_grad():
        hidden = model(
            pack.token_ids, pack.position_ids, packed=packed_seq_params(pack), select=pack.select, project=False
        )
    if not backward:
        return hidden
    model.zero_grad()
    (hidden * torch.linspace(-1, 1, hidden.shape[-1])).sum().backward()
    return hidden.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise", "mxfp8"])
def test_recomputed_activations_change_nothing(checkpoint, grid, recipe):
    fp8 = TENSORWISE.replace(recipe=recipe)
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    plain, again = make(checkpoint, grid, fp8), make(checkpoint, grid, fp8, megatron=recompute)
    for _ in range(2):  # the second with scales of the first
        (ours, our_gradients), (theirs, their_gradients) = run(again), run(plain)
        assert torch.equal(ours, theirs)
        assert our_gradients.keys() == their_gradients.keys() and len(our_gradients) > 30
        assert all(torch.equal(our_gradients[name], their_gradients[name]) for name in our_gradients)
        for model in (plain, again):
            model.emulated_fp8.end_update(group=grid.pg.tp_dp_cp)
    if recipe == "delayed":
        assert torch.equal(plain.emulated_fp8.scales.scale_M3, again.emulated_fp8.scales.scale_M3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise", "mxfp8"])
def test_a_model_in_fp8_is_near_itself_without(checkpoint, grid, recipe, dtype):
    exact, model = make(checkpoint, grid, None), make(checkpoint, grid, TENSORWISE.replace(recipe=recipe), dtype=dtype)
    expected, expected_gradients = run(exact)
    run(model)
    model.emulated_fp8.end_update(group=grid.pg.tp_dp_cp)
    hidden, gradients = run(model)
    distance = ((hidden.float() - expected).norm() / expected.norm()).item()
    assert 0.005 < distance < 0.15, "a router may send a token elsewhere"
    for name, gradient in gradients.items():
        if "proj" in name or "qkv.weight" in name:
            cosine = torch.cosine_similarity(gradient.float().flatten(), expected_gradients[name].flatten(), dim=0)
            assert cosine > 0.9, name


def test_passes_without_gradients_leave_no_trace(checkpoint, grid):
    model = make(checkpoint, grid, TENSORWISE.replace(recipe="delayed"))
    before = run(model, backward=False)
    scales = model.emulated_fp8.scales
    assert not scales.pending_M3.any()
    run(model)
    assert scales.pending_M3.any() and torch.equal(run(model, backward=False), before), "scales hold for an update"
    model.emulated_fp8.end_update(group=grid.pg.tp_dp_cp)
    assert not torch.equal(run(model, backward=False), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampling_is_not_rounded(checkpoint, grid, dtype):
    logits = []
    for fp8 in (None, TENSORWISE):
        model, cache, tokens = make(checkpoint, grid, fp8, dtype=dtype).eval(), KVCache(5, 4), torch.arange(7, 12)
        with torch.no_grad(), model.cached(cache):
            cache.begin_decode(5, 4)
            with model.decoding(5):
                logits.append(model(tokens[:, None], cache.lengths[:, None]))
        if fp8 is not None:
            assert all("_forward_impl" in vars(layer) for layer in model.emulated_fp8.layers.values())
    assert torch.equal(*logits)
