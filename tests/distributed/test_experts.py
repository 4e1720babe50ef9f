"""Training a mixture of experts in every layout: gradients, auxiliary losses and updates against transformers'
autograd, also where replicas that share experts hold unequal numbers of rows."""

from __future__ import annotations

import pytest
import torch
from experts import AUXILIARY, MIXED, ROWS, SPEC, draw_rows, expert_layouts, make_student, run_step, training_rows
from roles import (
    assert_same_state,
    hf_response_logits,
    log_prob_and_entropy,
    reference,
    whole_gradients,
    whole_state,
)

from fire_megatron.checkpoint.maps import pack, tensor_map
from fire_megatron.config.hf_config import read_hf_config


def micro_batches(layout, size, count=ROWS):
    """Rows of each micro-batch: each replica's own, longest first, ``size`` at a time."""
    lengths = [len(p) + len(r) for p, r in zip(*draw_rows(count), strict=True)]
    for replica in range(layout.data):
        order = sorted(range(replica, count, layout.data), key=lambda i: (-lengths[i], i))
        yield from (tuple(order[i : i + size]) for i in range(0, len(order), size))


def router_logits(model, tokens):
    """Logits of one row and router logits [L, E] of each layer that has experts."""
    seen = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda module, args, output: seen.append(output[0]))
        for layer in model.model.layers
        if hasattr(layer.mlp, "gate")
    ]
    try:
        logits = model(tokens[None]).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    return logits, seen


def expected_step(folder, batches, count=ROWS, auxiliary=AUXILIARY, spec=SPEC):
    """By transformers' autograd, one row at a time: metrics, and gradients by checkpoint key."""
    model, rows = spec.hf(), training_rows(range(count), count, spec)
    experts = model.config.num_experts
    prompts, responses = draw_rows(count)
    response_tokens = sum(len(r) for r in responses)
    all_tokens = response_tokens + sum(len(p) for p in prompts)
    loss = balance = square = 0.0
    loads = [torch.zeros(experts) for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    for batch in batches:
        by_layer = [[] for _ in loads]
        for row in batch:
            prompt, response = prompts[row], responses[row]
            logits, routed = router_logits(model, torch.cat((prompt, response)))
            for layer, values in zip(by_layer, routed, strict=True):
                layer.append(values)
            log_p = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(-1, response[:, None]).squeeze(-1)
            advantage = rows.teacher_log_probs[row] - log_p.detach()
            loss = loss - (advantage * log_p).sum() / response_tokens
        for load, values in zip(loads, by_layer, strict=True):
            values = torch.cat(values)
            scores, tokens = values.softmax(-1), len(values)
            chosen = torch.zeros_like(scores).scatter(1, scores.topk(2).indices, 1.0)
            # Switch: E times the sum over experts of its share of the choices and its mean score.
            aux = experts * ((chosen.sum(0) / (2 * tokens)) * scores.mean(0)).sum()
            balance = balance + aux * tokens / all_tokens
            square = square + values.logsumexp(-1).square().sum() / all_tokens
            load += chosen.sum(0)
    coefficients = auxiliary.get("moe_aux_loss_coeff", 0), auxiliary.get("moe_z_loss_coeff", 0)
    (loss + coefficients[0] * balance + coefficients[1] * square).backward()
    shape = read_hf_config(folder)
    gradients, parameters = {}, dict(model.named_parameters())
    for tensor in tensor_map(shape, fused=True):
        parts = [parameters[name].grad for name in tensor.sources]
        gradients[tensor.key] = torch.cat([part for _, part in pack(tensor, parts, shape)])
    peaks = torch.stack([load.max() / load.mean() for load in loads])
    metrics = {
        "moe/aux_loss": balance.item() / len(loads),
        "moe/z_loss": square.item() / len(loads),
        "moe/max_load": float(peaks.mean()),
    }
    return metrics, gradients


def assert_same_gradients(actual, expected, case):
    assert actual.keys() == expected.keys(), case
    for key, gradient in actual.items():
        scale = expected[key].abs().max()
        assert scale > 0 and (gradient - expected[key]).abs().max() <= 3e-5 * scale, f"{case}: {key}"


@pytest.mark.parametrize(("spec", "micro_batch_size"), [(SPEC, 1), (SPEC, 2), (MIXED, 2)], ids=["1", "2", "mixed"])
def test_gradients_and_auxiliary_losses_equal_transformers(roles, world_size, spec, micro_batch_size):
    folder, known = roles.checkpoint(spec), {}
    for layout in expert_layouts(world_size):
        if reference(spec).config.num_experts % layout.expert:
            continue
        batches = tuple(sorted(micro_batches(layout, micro_batch_size)))
        if batches not in known:
            known[batches] = expected_step(folder, batches, spec=spec)
        student, grid = make_student(roles, layout, micro_batch_size=micro_batch_size, source=spec)
        metrics = run_step(student, grid, spec=spec)
        for key, value in known[batches][0].items():
            assert metrics[key] == pytest.approx(value, rel=1e-5), f"{layout}: {key}"
        assert_same_gradients(whole_gradients(student, grid), known[batches][1], f"{layout}")


def test_routers_may_multiply_in_float64(roles, world_size):
    folder = roles.checkpoint(SPEC)
    layout = expert_layouts(world_size)[-1]
    metrics, gradients = expected_step(folder, tuple(micro_batches(layout, 2)))
    student, grid = make_student(roles, layout, micro_batch_size=2, megatron={**AUXILIARY, "moe_router_dtype": "fp64"})
    made = run_step(student, grid)
    for key, value in metrics.items():
        assert made[key] == pytest.approx(value, rel=1e-5), f"{layout}: {key}"
    assert_same_gradients(whole_gradients(student, grid), gradients, f"{layout}")


def test_the_auxiliary_losses_are_off_unless_asked_for(roles, world_size):
    folder = roles.checkpoint(SPEC)
    layout = expert_layouts(world_size)[-1]
    batches = tuple(micro_batches(layout, 1))
    student, grid = make_student(roles, layout, megatron={})
    metrics = run_step(student, grid)
    expected, gradients = expected_step(folder, batches, auxiliary={})
    assert "moe/aux_loss" not in metrics and "moe/z_loss" not in metrics
    assert metrics["moe/max_load"] == pytest.approx(expected["moe/max_load"])
    assert_same_gradients(whole_gradients(student, grid), gradients, f"{layout}")
    # And they matter: with them the router's gradient is another.
    _, others = expected_step(folder, batches)
    key = "decoder.layers.0.mlp.router.weight"
    assert (others[key] - gradients[key]).abs().max() > 0.01 * gradients[key].abs().max()


@pytest.mark.parametrize("distributed", [True, False])
def test_norm_and_update_do_not_depend_on_the_layout(roles, world_size, distributed):
    _, gradients = expected_step(roles.checkpoint(SPEC), [(row,) for row in range(ROWS)])
    norm = float(sum(gradient.double().square().sum() for gradient in gradients.values()).sqrt())
    assert norm > 0.5  # so that it is clipped
    expected = None
    for layout in expert_layouts(world_size):
        student, grid = make_student(roles, layout, distributed=distributed)
        run_step(student, grid)
        assert student.update()["grad_norm"].value == pytest.approx(norm, rel=1e-5), layout
        state = whole_state(student, grid)
        if expected is None:
            expected = state
        assert_same_state(state, expected, 1e-4)


def test_replicas_without_rows(roles, world_size):
    """One row: every replica but one takes part with padding, in passes for log-probabilities and in training."""
    _, gradients = expected_step(roles.checkpoint(SPEC), [(0,)], count=1)
    prompts, responses = draw_rows(1)
    expected = log_prob_and_entropy(hf_response_logits(reference(SPEC), prompts[0], responses[0]), responses[0])[0]
    for layout in expert_layouts(world_size):
        student, grid = make_student(roles, layout)
        mine = range(grid.dp_rank, 1, grid.layout.data)
        log_probs = student.log_probs(training_rows(mine, 1))
        assert len(log_probs) == len(mine)
        for ours in log_probs:
            torch.testing.assert_close(ours, expected.float(), rtol=0, atol=2e-5)
        run_step(student, grid, count=1)
        assert_same_gradients(whole_gradients(student, grid), gradients, f"{layout}")
