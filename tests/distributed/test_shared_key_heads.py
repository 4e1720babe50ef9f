"""More tensor ranks than key/value heads: gradients, updates, saving, resuming, sampling and the export are those of
fewer ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from cast import assert_same_gradients
from experts import draw_rows, make_student, run_step
from roles import Spec, assert_same_state, hf_logits, layouts, share, whole_gradients, whole_state
from steps import save_state

from fire_megatron.checkpoint.convert import megatron_to_hf
from fire_megatron.checkpoint.resuming import load_training_state
from fire_megatron.data.records import Prompt
from fire_megatron.rollout.engine import MegatronEngine
from fire_megatron.rollout.sampling import Sampling

pytestmark = pytest.mark.world_size(2)
SPECS = [
    Spec("qwen3", changes=(("num_hidden_layers", 2), ("num_key_value_heads", 1))),  # norms of the shared key head
    Spec("qwen2", changes=(("num_hidden_layers", 2), ("num_key_value_heads", 1))),  # biases
]


def sharing(size):
    """Of 4 ranks also two of them for the head, with pipeline, context or data ranks beside them."""
    return [x for x in layouts(size, tensors=(2, 4), pipelines=(1, 2), contexts=(1, 2)) if x.tensor > 1]


@pytest.fixture(params=SPECS, ids=lambda spec: spec.family)
def spec(request):
    return request.param


@pytest.fixture
def alone(world_size):
    """A layout in which no rank shares a head."""
    return layouts(world_size, tensors=(1,), pipelines=(1,))[0]


@pytest.mark.parametrize("recompute", [{}, {"recompute_granularity": "selective"}], ids=["", "recomputed"])
def test_gradients_and_updates(roles, world_size, spec, alone, recompute):
    student, grid = make_student(roles, alone, megatron={}, source=spec)
    metrics, gradients = run_step(student, grid, spec=spec), whole_gradients(student, grid)
    norm = student.update()["grad_norm"].value
    state = whole_state(student, grid)
    for number, layout in enumerate(sharing(world_size)):
        student, grid = make_student(roles, layout, megatron=recompute, source=spec, distributed=number % 2 == 1)
        made = run_step(student, grid, spec=spec)
        assert made["loss"] == pytest.approx(metrics["loss"], rel=1e-5), layout
        if number % 2 == 0:  # the distributed optimizer leaves each rank its own part of the gradients alone
            assert_same_gradients(whole_gradients(student, grid), gradients, f"{layout}")
        assert student.update()["grad_norm"].value == pytest.approx(norm, rel=1e-5), layout
        assert_same_state(whole_state(student, grid), state, 1e-4)


def test_saved_here_resumed_there_and_exported(roles, world, world_size, spec, alone):
    folder = roles.checkpoint(spec)
    layout = sharing(world_size)[-1]
    checkpoints = Path(share(str(roles.folder / f"shared-{spec.family}")))
    student, grid = make_student(roles, layout, megatron={}, source=spec, distributed=True)
    run_step(student, grid, spec=spec)
    student.update()
    saved = save_state(student, grid, source=folder, checkpoints=checkpoints)
    middle = whole_state(student, grid)
    if world.is_main:
        megatron_to_hf(saved, checkpoints / "exported")
    dist.barrier()
    for other in (alone, *sharing(world_size)):
        student, grid = make_student(roles, other, megatron={}, source=saved, distributed=True)
        load_training_state(saved, student.model, student.optimizer, grid=grid)
        assert_same_state(whole_state(student, grid), middle, 0)
    student, grid = make_student(roles, layout, megatron={}, source=saved)
    prompts, _ = draw_rows()
    rows = [Prompt(i, "math", tuple(tokens.tolist()), "") for i, tokens in enumerate(prompts)]
    mine = list(grid.own_rows(len(rows)))
    sampling = Sampling(max_new_tokens=9, temperature=0.0)
    made = MegatronEngine(student.model, grid).generate([rows[i] for i in mine], mine, sampling=sampling, step=0)
    exported = transformers.AutoModelForCausalLM.from_pretrained(checkpoints / "exported").eval()
    for row, tokens, log_probs in zip(mine, made.responses, made.log_probs, strict=True):
        logits = hf_logits(exported, torch.cat((prompts[row], tokens)))[len(prompts[row]) - 1 : -1]
        assert tokens.tolist() == logits.argmax(-1).tolist()
        expected = logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
        torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-4)
