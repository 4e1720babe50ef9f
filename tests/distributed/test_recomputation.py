"""Every setting of recomputation that rules allow, in every layout, of a dense model and of one with experts: the loss,
the routers' losses and all gradients are those of a pass that keeps everything."""

from __future__ import annotations

import pytest
import torch
from experts import AUXILIARY, MIXED, SPEC, expert_layouts, make_student, run_step
from roles import Spec, reference, telling_layouts, whole_gradients

from fire_megatron.config.hf_config import read_hf_config
from fire_megatron.config.rules.facts import Role
from fire_megatron.config.rules.recomputation import recomputation
from fire_megatron.config.schema import ParallelConfig, StudentConfig

DENSE = Spec("qwen3", changes=(("num_hidden_layers", 3),))
PARTS = ("core_attn", "mlp", "moe")
SETTINGS = [
    *(
        {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": number}
        for method, number in (("uniform", 1), ("uniform", 2), ("uniform", 3), ("block", 1), ("block", 2))
    ),
    *({"recompute_granularity": "selective", "recompute_modules": [part]} for part in PARTS),
    {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe"]},
]


def allowed(folder, layout, settings):
    role = StudentConfig(checkpoint=str(folder), parallel=ParallelConfig(pipeline=layout.pipeline), megatron=settings)
    return not list(recomputation(Role("student.{}".format, role, trains=True, shape=read_hf_config(folder))))


def gradients(roles, layout, spec, megatron):
    student, grid = make_student(roles, layout, micro_batch_size=2, megatron=megatron, source=spec)
    metrics = run_step(student, grid, spec=spec)
    return {key: value for key, value in metrics.items() if key == "loss" or "moe" in key}, whole_gradients(
        student, grid
    )


@pytest.mark.two_ranks
@pytest.mark.parametrize("spec", [DENSE, SPEC, MIXED], ids=["dense", "experts", "mixed"])
def test_recomputation_changes_nothing(roles, world_size, spec):
    folder, tried = roles.checkpoint(spec), set()
    routers = {} if spec is DENSE else AUXILIARY
    layouts = telling_layouts(world_size) if spec is DENSE else expert_layouts(world_size)
    for layout in layouts:
        if spec is not DENSE and reference(spec).config.num_experts % layout.expert:
            continue
        metrics, expected = gradients(roles, layout, spec, routers)
        assert "loss" in metrics and (spec is DENSE or "moe/z_loss" in metrics)
        for number, settings in enumerate(SETTINGS):
            if not allowed(folder, layout, settings):
                continue
            tried.add(number)
            case = f"{layout} {settings}"
            again, found = gradients(roles, layout, spec, {**routers, **settings})
            assert again == pytest.approx(metrics, rel=1e-6), case
            assert found.keys() == expected.keys()
            for key, gradient in found.items():
                apart = (gradient - expected[key]).abs().max()
                assert apart <= 1e-5 * expected[key].abs().max(), f"{case}: {key}"
    assert len(tried) >= 7, tried


@pytest.mark.two_ranks
def test_outputs_that_are_sent_on_may_be_freed(roles, world_size):
    for layout in telling_layouts(world_size):
        if layout.pipeline > 1:
            _, expected = gradients(roles, layout, DENSE, {})
            _, found = gradients(roles, layout, DENSE, {"deallocate_pipeline_outputs": True})
            for key, gradient in found.items():
                assert torch.equal(gradient, expected[key]), f"{layout} {key}"
