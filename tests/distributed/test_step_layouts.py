"""The same batch gives the same loss and gradients in every layout, micro-batch size and data-parallel split."""

from __future__ import annotations

import dense
import pytest
import torch
import torch.distributed as dist
from cast import ESTIMATORS, Cast, assert_same_gradients
from models import EOS, VOCABULARY, make_hf
from roles import (
    hf_response_logits,
    layouts,
    load_role,
    log_prob_and_entropy,
    parallel_config,
    telling_layouts,
)
from steps import ROWS, rollouts_of, rows

from fire_megatron.config.hf_config import read_hf_config
from fire_megatron.config.loss import LossConfig
from fire_megatron.config.schema import StudentConfig, TeacherConfig
from fire_megatron.losses.fused import OutputLayer
from fire_megatron.rollout.engine import MegatronEngine
from fire_megatron.rollout.sampling import Sampling
from fire_megatron.teachers.heads import teacher_heads


def run_step(folder, world, factory, layout, micro_batch_size, loss=None, teachers=None, *, count=ROWS, **options):
    """Metrics and whole gradients of a step."""
    cast = Cast(
        folder, world, factory, layout, teachers or layout, loss or LossConfig(), micro_batch_size=micro_batch_size,
        **options,
    )  # fmt: skip
    return cast.step(count)[1:]


def assert_same_step(step, reference, case):
    (metrics, gradients), (reference_metrics, reference_gradients) = step, reference
    assert metrics.keys() == reference_metrics.keys(), case
    for key in metrics:
        if "bytes_per_token" not in key:  # which grow with the ranks that get them
            assert metrics[key] == pytest.approx(reference_metrics[key], rel=1e-5, abs=1e-7), f"{case}: {key}"
    assert_same_gradients(gradients, reference_gradients, case)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_loss_and_gradients_do_not_depend_on_the_layout(checkpoints, world, factory, estimator):
    loss, mixed, reference = ESTIMATORS[estimator], estimator != "topk", None
    options = telling_layouts(world.size)
    for number, layout in enumerate(options):
        # The teachers' layout is another than the student's, each meets each in turn.
        theirs = options[number - 1]
        # Rows have 4 to 23 tokens: a budget of 30 packs two or three of them, one of 12 leaves the longest alone.
        sizes = [(1, 0), (2, 0), (4, 0), (1, 12), (1, 30)]
        # All of them on the first layout, one on each of the others in turn.
        for size, budget in sizes if number == 0 else [sizes[number % 5]]:
            step = run_step(
                checkpoints, world, factory, layout, size, loss, theirs, mixed=mixed, micro_batch_tokens=budget
            )
            if reference is None:
                reference = step
                assert abs(step[0]["loss"]) > 1e-3
            assert_same_step(step, reference, f"{layout}, {theirs}, micro-batch {size}, {budget} tokens")


VARIANTS = {
    "without sequence parallelism": ({"sequence": False}, lambda layout: layout.tensor > 1),
    "one row, so replicas have none": ({"count": 1}, lambda layout: layout.data > 1),
    "a tied student with the larger vocabulary": ({"name": "tied"}, lambda layout: layout.pipeline > 1),
}
"""Options, and the layouts that they are about."""


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("estimator", ["sampled", "full", "topk"])
def test_variants_do_not_depend_on_the_layout(checkpoints, world, factory, estimator, variant):
    loss, (options, concerned) = ESTIMATORS[estimator].replace(hooks=()), VARIANTS[variant]
    every = telling_layouts(world.size)
    reference = next(layout for layout in every if not concerned(layout))
    expected = run_step(checkpoints, world, factory, reference, 2, loss, **options)
    for layout in filter(concerned, every):
        step = run_step(checkpoints, world, factory, layout, 2, loss, reference, **options)
        assert_same_step(step, expected, f"{variant}, {layout}")


def test_no_logits_are_held_after_a_step(checkpoints, world, factory, monkeypatch):
    layers = []
    real = OutputLayer.__init__

    def listening(layer, *args, **kwargs):
        layers.append(layer)
        real(layer, *args, **kwargs)

    monkeypatch.setattr(OutputLayer, "__init__", listening)
    run_step(checkpoints, world, factory, layouts(world.size)[0], 2, ESTIMATORS["full"], mixed=True)
    assert len(layers) >= 4 and all(layer.held == 0 for layer in layers)


@pytest.mark.two_ranks
def test_output_weights_of_teachers_are_theirs_shared_or_read(checkpoints, world, factory):
    shape = read_hf_config(checkpoints / "code")
    weight = make_hf("llama", seed=2, hidden_size=96, num_hidden_layers=2, vocab_size=320).lm_head.weight
    config = TeacherConfig(checkpoint=str(checkpoints / "code"), vocab_multiple=4)
    shared = []
    for layout in layouts(world.size, pipelines=(1, 2)):
        for theirs in layouts(world.size, pipelines=(1, 2)):
            parallel = [parallel_config(x) for x in (layout, theirs)]
            role = StudentConfig(checkpoint=str(checkpoints / "student"), vocab_multiple=4, parallel=parallel[0])
            student = load_role(checkpoints / "student", role, factory.grid(layout), world)
            own = load_role(checkpoints / "code", config.replace(parallel=parallel[1]), factory.grid(theirs), world)
            own.used_vocab_size = VOCABULARY
            heads = teacher_heads({"code": config}, {"code": shape}, {"code": own}, student)
            if not student.post_process:
                assert heads == {}
                continue
            rows = heads["code"].weight_VH[: heads["code"].columns]
            assert torch.equal(rows, weight[student.vocab_start :][: student.used_columns])
            shared.append(own.post_process and rows.data_ptr() == own.output_weight.data_ptr())
    assert True in shared and False in shared


@pytest.mark.parametrize("estimator", ["full", "full, log_probs", "topk"])
def test_the_loss_is_the_dense_divergence_from_transformers_logits(checkpoints, world, factory, estimator):
    loss, mixed = ESTIMATORS[estimator].replace(hooks=()), estimator != "topk"
    layout = layouts(world.size)[-1]
    metrics, _ = run_step(checkpoints, world, factory, layout, 2, loss, mixed=mixed)
    models = {
        "student": make_hf("qwen3", num_hidden_layers=3),
        "math": make_hf("qwen3", seed=1, num_hidden_layers=5),
        "code": make_hf("llama", seed=2, hidden_size=96, num_hidden_layers=2, vocab_size=320),
    }
    total = tokens = 0
    for prompt, response in zip(*rows(mixed), strict=True):
        logits = {
            name: hf_response_logits(model, torch.tensor(prompt.token_ids), response)[:, :VOCABULARY]
            for name, model in models.items()
        }
        log_s = dense.log_softmax(logits["student"], loss.temperatures[0])
        names, shares = zip(*prompt.shares, strict=True)
        shares = torch.tensor(shares).expand(len(response), -1)
        log_t = dense.mixture([logits[n] for n in names], shares, loss.mixture, loss.temperatures[1])
        if loss.estimator == "topk":
            ids = log_t.topk(loss.top_k).indices
            log_s, log_t = dense.buckets(log_s, ids), dense.buckets(log_t, ids)
        total += dense.divergence(loss.divergence, log_s, log_t, beta=loss.beta).sum()
        tokens += len(response)
    assert metrics["loss"] == metrics["loss/divergence"] == pytest.approx(float(total / tokens), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.8])
def test_sampled_loss_and_gradient_are_the_dense_ones_at_the_temperature(checkpoints, world, factory, temperature):
    """Of student and teachers, as the engine samples; entropies stay those of temperature 1."""
    layout = telling_layouts(world.size)[-1]
    cast = Cast(checkpoints, world, factory, layout, layout, LossConfig(temperature=temperature, hooks=()))
    scores, metrics, gradients = cast.step()
    student = make_hf("qwen3", num_hidden_layers=3)
    teachers = {
        "math": make_hf("qwen3", seed=1, num_hidden_layers=5),
        "code": make_hf("llama", seed=2, hidden_size=96, num_hidden_layers=2, vocab_size=320),
    }
    student.lm_head.weight.requires_grad_()
    total, tokens, sampled = 0, 0, rollouts_of(range(ROWS))
    for row, (prompt, response) in enumerate(zip(sampled.prompts, sampled.responses, strict=True)):
        text = torch.cat((torch.tensor(prompt.token_ids), response))
        logits = student(text[None]).logits[0, len(prompt.token_ids) - 1 : -1, :VOCABULARY]
        log_prob, _ = log_prob_and_entropy(logits / temperature, response)
        theirs = hf_response_logits(teachers[prompt.label], torch.tensor(prompt.token_ids), response)[:, :VOCABULARY]
        teacher, _ = log_prob_and_entropy(theirs / temperature, response)
        _, entropy = log_prob_and_entropy(theirs, response)
        torch.testing.assert_close(scores[row][0].double(), teacher, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(scores[row][1].double(), entropy, rtol=1e-5, atol=1e-5)
        old = log_prob.detach()
        importance = (old - sampled.log_probs[row]).exp().clamp_max(2.0)
        total = total - (importance * (teacher - old) * (log_prob - old).exp()).sum()
        tokens += len(response)
    (total / tokens).backward()
    assert metrics["loss"] == pytest.approx(float(total / tokens), rel=1e-5)
    ours, expected = gradients["output_layer.weight"][:VOCABULARY], student.lm_head.weight.grad[:VOCABULARY]
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_bytes_that_teachers_send(checkpoints, world, factory):
    hidden = {"math": 64, "code": 96}
    for layout in telling_layouts(world.size)[
        -1 if world.size == 4 else 0 :
    ]:  # of 4 ranks with tensor and context ranks
        for estimator, width in {
            "sampled": dict.fromkeys(hidden, 0),
            "full": hidden,
            "topk": dict.fromkeys(hidden, 15),
        }.items():
            metrics, _ = run_step(checkpoints, world, factory, layout, 2, ESTIMATORS[estimator])
            for name in hidden:
                # A slice for each tensor rank of each context rank, and log-probability and entropy.
                tensor = layout.tensor
                states = 4 * layout.context * tensor * -(-width[name] // tensor)
                assert metrics[f"teacher/{name}/bytes_per_token"] == states + 8
                assert metrics[f"teacher/{name}/bytes_per_token_of_logits"] == 4 * VOCABULARY


def test_teacher_equal_to_student_gives_no_gradient(checkpoints, world, factory, folder):
    for name in ("student", "math", "code") if world.is_main else ():
        (folder / name).symlink_to(checkpoints / "student")
    dist.barrier()
    layout = layouts(world.size)[-1]
    cast = Cast(folder, world, factory, layout, layout, LossConfig(hooks=()))
    prompts, mine = rows()[0], cast.grid.own_rows(ROWS)
    sampling = Sampling(max_new_tokens=9, stop_ids=frozenset([EOS]), seed=5)
    engine = MegatronEngine(cast.model, cast.grid)
    rollouts = engine.generate([prompts[i] for i in mine], mine, sampling=sampling, step=0)
    scores, metrics, gradients = cast.step(rollouts=rollouts)
    for row, log_probs in zip(mine, rollouts.log_probs, strict=True):
        torch.testing.assert_close(log_probs, scores[row][0], rtol=0, atol=2e-5)
    for name in ("math", "code"):
        assert metrics[f"teacher/{name}/reverse_kl"] == pytest.approx(0, abs=1e-5)
    assert max(gradient.abs().max() for gradient in gradients.values()) < 1e-4
