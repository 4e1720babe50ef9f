"""Packed weights give the same products, leave the model as it was, and follow the weights of the next update."""

from __future__ import annotations

import pytest
import torch
from models import save_megatron

from fire_megatron.checkpoint.loading import load_weights
from fire_megatron.config.hf_config import read_hf_config
from fire_megatron.config.schema import StudentConfig
from fire_megatron.models.build import build_model
from fire_megatron.models.kv_cache import KVCache
from fire_megatron.models.packed_linear import packed_linears
from fire_megatron.platform.device import Device


@pytest.fixture(params=["llama3-tied", "qwen2", "qwen3"])
def model(request, grid, tmp_path):
    save_megatron(request.param, tmp_path / "m", num_hidden_layers=2)
    role = StudentConfig(checkpoint=str(tmp_path / "m"), vocab_multiple=4)
    model = build_model(read_hf_config(tmp_path / "m"), role, grid, device=Device("cpu"))
    load_weights(model, tmp_path / "m", grid=grid)
    return model.eval()


def layers_in_use(model):
    return [m for m in model.modules() if "_forward_impl" in vars(m)]


def decode(model, rows, *, packed_for=None):
    cache = KVCache(rows, 4)
    tokens = torch.arange(7, 7 + rows)[:, None]
    with torch.no_grad(), model.cached(cache):
        cache.begin_decode(rows, 4)
        if packed_for is None:
            return model(tokens, cache.lengths[:, None])
        with model.decoding(packed_for):
            assert len(layers_in_use(model)) == 9, "4 in each layer, and the output layer"
            return model(tokens, cache.lengths[:, None])


@pytest.mark.parametrize(("rows", "packed_for"), [(1, 1), (5, 5), (3, 8), (40, 2)])
def test_same_logits(model, rows, packed_for):
    plain, packed = decode(model, rows), decode(model, rows, packed_for=packed_for)
    scale = plain[:, :301].abs().max()
    assert (plain - packed)[:, :301].abs().max() < 1e-5 * scale
    assert torch.equal(plain[:, 301:], packed[:, 301:])
    assert not layers_in_use(model)


def test_weights_are_packed_anew_each_time(model):
    before = decode(model, 4, packed_for=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    after = decode(model, 4, packed_for=4)
    assert (after - decode(model, 4))[:, :301].abs().max() < 1e-5 * after[:, :301].abs().max()
    assert not torch.equal(before, after)


def test_an_error_inside_leaves_the_layers_alone(model):
    with pytest.raises(KeyError), model.decoding(4):
        raise KeyError
    assert not layers_in_use(model)


def test_other_formats_are_left_alone(model):
    layer = model.output_layer
    with packed_linears([(layer, torch.zeros(8, 8, dtype=torch.bfloat16))], 4):
        assert not layers_in_use(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_models_are_float32(model, dtype):
    model.to(dtype)
    hidden = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).mul(20).to(dtype)
    logits = model.logits(hidden)
    exact = hidden.double() @ model.output_weight.double().t()
    assert logits.dtype == torch.float32 and not logits.requires_grad
    used = model.used_columns
    assert logits[:, :used].abs().max() > 16 and (logits[:, used:] == -torch.inf).all()
    torch.testing.assert_close(logits[:, :used].double(), exact[:, :used], rtol=0, atol=1e-4)
