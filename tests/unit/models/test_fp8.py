"""FP8 settings in megatron-core's words, with either release and without Transformer Engine."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from megatron.core import fp8_utils
from megatron.core.transformer import transformer_block
from megatron.core.transformer.transformer_config import TransformerConfig

from fire_megatron.config.rules import precision
from fire_megatron.config.schema import FP8Config, PrecisionConfig, RoleConfig
from fire_megatron.models import pipeline
from fire_megatron.models.fp8 import settings as fp8


def config_of(role=None, **settings):
    base = {"num_layers": 8, "hidden_size": 64, "num_attention_heads": 4, "bf16": True, "params_dtype": torch.bfloat16}
    return TransformerConfig(**base, **settings, **(fp8.fp8_settings(role) if role else {}))


def role_of(**values):
    return RoleConfig(checkpoint="none", precision=PrecisionConfig(dtype="bfloat16", fp8=FP8Config(**values)))


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
@pytest.mark.parametrize("format", ["hybrid", "e4m3"])
def test_settings_are_megatron_cores(recipe, format):
    scales = {"margin": 2, "amax_history": 16, "amax_algorithm": "most_recent"} if recipe == "delayed" else {}
    config = config_of(role_of(recipe=recipe, format=format, **scales))
    assert (config.fp8, config.fp8_recipe) == (format, recipe)
    if scales:
        found = config.fp8_margin, config.fp8_amax_history_len, config.fp8_amax_compute_algo
        assert found == (2, 16, "most_recent")
    assert not config.fp8_param and not config.first_last_layers_bf16


def test_layers_at_the_ends_stay_in_bfloat16():
    config = config_of(role_of(first_last_bf16=2, param_gather=True))
    assert config.fp8_param
    assert [fp8_utils.is_first_last_bf16_layer(config, i) for i in range(8)] == [True] * 2 + [False] * 4 + [True] * 2


def test_emulation_and_no_fp8_leave_megatron_core_alone():
    assert fp8.fp8_settings(role_of(emulate=True)) == {} == fp8.fp8_settings(RoleConfig(checkpoint="none"))


def test_the_context_is_ours_wherever_a_forward_pass_looks_for_it():
    """A release of megatron-core that names it otherwise, or looks elsewhere, must not pass unnoticed."""
    assert fp8_utils.get_fp8_context is fp8.fp8_context is transformer_block.get_fp8_context
    assert fp8._megatrons.__module__ == "megatron.core.fp8_utils"
    with pytest.raises(AttributeError, match="fire_fp8"):  # a model that was given no ranks of its own
        fp8.fp8_context(config_of(role_of()))
    assert isinstance(fp8.fp8_context(config_of()), contextlib.nullcontext)


@pytest.mark.parametrize(
    ("recipe", "tensor", "multiple"), [("tensorwise", 1, 16), ("delayed", 4, 64), ("mxfp8", 2, 64), (None, 4, 4)]
)
def test_packs_are_cut_in_blocks(recipe, tensor, multiple):
    role = role_of(recipe=recipe) if recipe else None
    config = config_of(role, tensor_model_parallel_size=tensor, sequence_parallel=tensor > 1)
    assert fp8.token_multiple(config) == multiple


@pytest.mark.parametrize(
    ("recipe", "forward_only", "packs"), [("delayed", False, 5), ("delayed", True, 2), ("tensorwise", False, 2)]
)
def test_replicas_train_in_lockstep_with_delayed_scaling(recipe, forward_only, packs, monkeypatch):
    """Each pass ends with a collective of the whole stage there, and replicas differ in their number of passes."""
    counts = {"stage": 5, "experts": 2}
    monkeypatch.setattr(pipeline, "largest", lambda value, *, group: [counts[group]])
    model = SimpleNamespace(config=config_of(role_of(recipe=recipe)))
    grid = SimpleNamespace(
        pg=SimpleNamespace(tp_dp_cp="stage", ep="experts"), layout=SimpleNamespace(context=1), cp_rank=0
    )
    batches = pipeline._in_lockstep(["one", "two"], model, grid, forward_only=forward_only)
    assert len(batches) == packs and batches[:2] == ["one", "two"]
    assert all(pack.token_ids.shape == (1, 16) and len(pack.select) == 0 for pack in batches[2:])


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_blocks_are_megatron_cores(recipe):
    """The rule on a model's sizes knows them without megatron-core."""
    assert precision.BLOCK[recipe] == fp8_utils.get_fp8_align_size(recipe)
    assert precision.BLOCK[recipe] == fp8.token_multiple(config_of(role_of(recipe=recipe)))


def test_fp8_copies_of_weights_are_given_up_after_a_pass():
    layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    layers[0]._fp8_workspaces = {"weight": torch.ones(2)}
    fp8.release_quantized_weights(layers)
    assert layers[0]._fp8_workspaces == {}
