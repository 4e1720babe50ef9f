"""Mixtures of experts in every layout: training, its auxiliary losses, scoring, generation and resuming, also where
replicas that share experts hold unequal numbers of rows."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import VOCABULARY, save_megatron
from roles import (
    Roles,
    Spec,
    assert_same_state,
    hf_response_logits,
    layouts,
    log_prob_and_entropy,
    reference,
    share,
    whole_gradients,
    whole_state,
)
from tiny_run import make_inputs, read_metrics, tiny_recipe

from fire_megatron.checkpoint.maps import pack, tensor_map
from fire_megatron.checkpoint.training import load_training_state, save_training_state
from fire_megatron.config.checks import check_recipe
from fire_megatron.config.load import recipe_from_dict
from fire_megatron.config.loss import LossConfig
from fire_megatron.config.schema import OptimizerConfig, PrecisionConfig, RolloutConfig
from fire_megatron.data.records import Prompt
from fire_megatron.data.rollouts import Rollouts, Target, TrainingRows
from fire_megatron.evaluation.heldout import replica_rows
from fire_megatron.metrics.values import reduce_metrics
from fire_megatron.models.hf_config import read_hf_config
from fire_megatron.parallel.reducer import Reducer
from fire_megatron.platform import launch
from fire_megatron.rollout.engine import MegatronEngine
from fire_megatron.teachers.teacher import Teacher
from fire_megatron.train.student import Student
from fire_megatron.train.trainer import Trainer

SPEC = Spec("qwen3-moe", changes=(("num_hidden_layers", 2),))
MIXED = Spec("qwen3-moe-mixed", changes=(("num_hidden_layers", 2),))
"""Its second layer is dense, which of two pipeline stages is one without a router."""
ROWS = 5
MACHINE = ("time/", "memory/", "rollout/tokens_per_second", "teacher/")
"""Metrics of the machine; and the teachers' traffic, which depends on the student's tensor size."""
AUXILIARY = {"moe_aux_loss_coeff": 0.3, "moe_z_loss_coeff": 0.02}


@pytest.fixture(scope="module")
def roles(world, tmp_path_factory):
    return Roles(world, Path(share(str(tmp_path_factory.mktemp("models")))))


def expert_layouts(size):
    """Every tensor x pipeline x expert split; the last ones spread the experts widest."""
    return layouts(size, pipelines=(1, 2), experts=(1, 2, 4))


def draw_rows(count=ROWS):
    """Prompts and responses; odd lengths, so that sequence parallelism pads, and one response of a single token."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(6, VOCABULARY, (3 + 2 * i,), generator=generator) for i in range(count)]
    responses = [torch.randint(6, VOCABULARY, (1 + (5 * i) % 9,), generator=generator) for i in range(count)]
    return prompts, responses


def training_rows(mine, count=ROWS, spec=SPEC):
    """This replica's rows, with made-up teacher log-probabilities; the rollout's are the student's own."""
    prompts, responses = draw_rows(count)
    generator = torch.Generator().manual_seed(4)
    teacher = [-4.0 - torch.rand(len(r), generator=generator) for r in responses]
    own = [
        log_prob_and_entropy(hf_response_logits(reference(spec), p, r), r)[0].float()
        for p, r in zip(prompts, responses, strict=True)
    ]
    rollouts = Rollouts(
        row_ids=tuple(mine),
        prompts=tuple(Prompt(i, "math", tuple(prompts[i].tolist()), "") for i in mine),
        responses=tuple(responses[i] for i in mine),
        log_probs=tuple(own[i] for i in mine),
        entropies=tuple(torch.ones(len(responses[i])) for i in mine),
        truncated=tuple(False for _ in mine),
        weight_version=0,
    )
    return TrainingRows(
        rollouts=rollouts,
        targets=tuple(Target(("math",), (1.0,)) for _ in mine),
        teacher_log_probs=tuple(teacher[i] for i in mine),
        weights=tuple(torch.ones(len(responses[i])) for i in mine),
    )


def make_student(
    roles, layout, *, distributed=False, micro_batch_size=1, megatron=AUXILIARY, source=SPEC, dtype="float32"
):
    model, grid = roles.build(source, layout, vocab_multiple=4, megatron=megatron, dtype=dtype)
    model.used_vocab_size = VOCABULARY
    settings = OptimizerConfig(
        lr=1e-3, eps=1e-3, weight_decay=0.1, clip_grad=0.5, micro_batch_size=micro_batch_size, distributed=distributed
    )
    student = Student(
        model, grid, loss=LossConfig(hooks=()), optimizer=settings, precision=PrecisionConfig(dtype=dtype)
    )
    return student, grid


def run_step(student, grid, count=ROWS, spec=SPEC):
    """Accumulate the gradients of one update; returns the reduced metrics."""
    rows = training_rows(replica_rows(count, grid), count, spec)
    tokens = student.count_tokens(rows, Reducer(grid.pg.dp))
    return reduce_metrics(student.accumulate_gradients(rows, tokens=tokens), group=grid.span)


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


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    ],
    ids=["full", "moe"],
)
def test_recomputed_activations_give_the_same_gradients(roles, world_size, recompute):
    """A pass that is run again in backward counts no token twice."""
    folder, layout = roles.checkpoint(SPEC), expert_layouts(world_size)[-1]
    metrics, gradients = expected_step(folder, tuple(micro_batches(layout, 2)))
    student, grid = make_student(roles, layout, micro_batch_size=2, megatron={**AUXILIARY, **recompute})
    made = run_step(student, grid)
    for key, value in metrics.items():
        assert made[key] == pytest.approx(value, rel=1e-5), key
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
        mine = replica_rows(1, grid)
        log_probs = student.log_probs(training_rows(mine, 1))
        assert len(log_probs) == len(mine)
        for ours in log_probs:
            torch.testing.assert_close(ours, expected.float(), rtol=0, atol=2e-5)
        run_step(student, grid, count=1)
        assert_same_gradients(whole_gradients(student, grid), gradients, f"{layout}")


@pytest.mark.parametrize("count", [0, 1, 5])
def test_scores_of_uneven_rows(roles, world_size, count):
    prompts, responses = draw_rows(count)
    expected = [
        log_prob_and_entropy(hf_response_logits(reference(SPEC), p, r), r)
        for p, r in zip(prompts, responses, strict=True)
    ]
    for layout, sequence in itertools.product(expert_layouts(world_size), (None, False)):
        if sequence is False and layout.tensor == 1:
            continue
        model, grid = roles.build(SPEC, layout, sequence=sequence)
        teacher = Teacher("math", model, grid, micro_batch_tokens=12)
        scored = teacher.score(prompts, responses)
        for ours, entropy, (log_prob, expected_entropy) in zip(
            scored.log_probs, scored.entropies, expected, strict=True
        ):
            torch.testing.assert_close(ours.double(), log_prob, rtol=0, atol=3e-5)
            torch.testing.assert_close(entropy.double(), expected_entropy, rtol=0, atol=3e-5)


@pytest.mark.parametrize("top_k", [1, 3])
def test_weights_that_are_not_normalised(roles, world_size, top_k):
    changes = (("num_hidden_layers", 2), ("norm_topk_prob", False), ("num_experts_per_tok", top_k))
    spec, (prompts, responses) = Spec("qwen3-moe", changes=changes), draw_rows(3)
    model, grid = roles.build(spec, expert_layouts(world_size)[-1])
    scored = Teacher("math", model, grid, micro_batch_tokens=64).score(prompts, responses)
    for prompt, response, ours in zip(prompts, responses, scored.log_probs, strict=True):
        logits = hf_response_logits(reference(spec), prompt, response)
        torch.testing.assert_close(ours.double(), log_prob_and_entropy(logits, response)[0], rtol=0, atol=3e-5)


def generate(model, grid, prompts, rows, *, stop_ids=(), batch_size=0):
    """Greedy responses by row, put together from all replicas."""
    config = RolloutConfig(
        prompts_per_step=len(prompts),
        max_new_tokens=9,
        temperature=0.0,
        **({"batch_size": batch_size} if batch_size else {}),
    )
    engine = MegatronEngine(model, grid, config, stop_ids=stop_ids, seed=5)
    mine = [rows[i] for i in replica_rows(len(rows), grid)]
    made = engine.generate([prompts[i] for i in mine], mine, step=0)
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, dict(zip(mine, (r.tolist() for r in made.responses), strict=True)))
    return {row: tokens for part in gathered for row, tokens in part.items()}


def test_generation_of_uneven_rows(roles, world_size):
    prompts = [Prompt(i, "math", tuple(p.tolist()), "") for i, p in enumerate(draw_rows(7)[0])]
    expected = None
    for layout in expert_layouts(world_size):
        model, grid = roles.build(SPEC, layout)
        model.eval()
        whole = generate(model, grid, prompts, range(7))
        if expected is None:
            expected = whole
            row, hf = prompts[3].token_ids, reference(SPEC)
            made = hf_response_logits(hf, torch.tensor(row), torch.tensor(whole[3])).argmax(-1)
            assert made.tolist() == whole[3]
        assert whole == expected, layout
        # Rows end at different positions, so that replicas with nothing left go along with the others.
        stops = {expected[0][0], expected[1][3], expected[4][1]}
        cut = {}
        for row, tokens in expected.items():
            ends = [i for i, token in enumerate(tokens) if token in stops]
            cut[row] = tokens[: ends[0] + 1] if ends else tokens
        assert len({len(tokens) for tokens in cut.values()}) > 2
        assert generate(model, grid, prompts, range(7), stop_ids=stops) == cut, layout
        assert generate(model, grid, prompts, range(7), stop_ids=stops, batch_size=2) == cut, layout
        # Fewer rows than replicas, and none at all.
        assert generate(model, grid, prompts, [4], stop_ids=stops) == {4: cut[4]}, layout
        assert generate(model, grid, prompts, []) == {}, layout


def test_a_run_does_not_depend_on_the_layout(world, roles, world_size):
    """Student and a teacher with experts through whole steps: sampling, scoring, training, evaluation, saving."""
    folder, expected = roles.folder / "run", None
    if world.is_main:
        folder.mkdir()
        make_inputs(folder)
        for name, seed in (("student", 0), ("math", 1)):
            shutil.rmtree(folder / name)
            save_megatron("qwen3-moe", folder / f"{name}-experts", seed=seed, num_hidden_layers=2)
            (folder / f"{name}-experts").rename(folder / name)
    dist.barrier()
    options = expert_layouts(world_size)
    watch = launch.watch(world, roles="student, teachers", timeout=60.0)
    for number, layout in enumerate((options[0], options[-1])):
        parallel = {"tensor": layout.tensor, "pipeline": layout.pipeline, "expert": layout.expert}
        changes = {
            "student__parallel": parallel,
            "teachers__math__parallel": {"expert": layout.expert},
            "student__megatron": AUXILIARY,
            "run__steps": 2,
            "rollout__prompts_per_step": 5,
            "optimizer": {"lr": 2e-4, "eps": 1e-3, "mini_batches": 2},
            "evaluation": {"prompts": [{"path": str(folder / "code.jsonl")}], "num_prompts": 3, "max_new_tokens": 5},
        }
        recipe = recipe_from_dict(tiny_recipe(folder, folder / f"run-{number}", **changes))
        check_recipe(recipe, world_size=world_size)
        assert Trainer(recipe, world, watch).train()
        dist.barrier()
        lines = [
            {key: value for key, value in line.items() if not key.startswith(MACHINE)}
            for line in read_metrics(folder / f"run-{number}")
        ]
        assert {"moe/aux_loss", "moe/z_loss", "moe/max_load", "eval/code/reverse_kl"} <= lines[-1].keys()
        expected = expected or lines
        for ours, theirs in zip(lines, expected, strict=True):
            assert ours.keys() == theirs.keys()
            for key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=2e-3, abs=2e-4), f"{layout}: {key}"
    watch.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_in_another_layout(roles, world_size, dtype):
    """State saved in one split of the experts is exactly the state loaded in another, and goes on alike."""
    folder = roles.checkpoint(SPEC)
    checkpoints = Path(share(str(roles.folder / f"runs-{dtype}")))
    *others, first = expert_layouts(world_size)
    student, grid = make_student(roles, first, distributed=True, dtype=dtype)
    run_step(student, grid)
    student.update()
    saved = save_training_state(
        checkpoints, 1, student.model, student.optimizer, rng={}, extra={}, source=folder, keep=1, grid=grid
    )
    middle = whole_state(student, grid)
    kinds = {kind for (kind, key), value in middle[0].items() if "experts" in key and value.abs().max() > 0}
    assert kinds == {"weight", "exp_avg", "exp_avg_sq"} | ({"master"} if dtype == "bfloat16" else set())
    run_step(student, grid)
    student.update()
    end = whole_state(student, grid)
    for number, layout in enumerate(others):
        student, grid = make_student(roles, layout, distributed=number % 2 == 0, source=saved, dtype=dtype)
        load_training_state(saved, student.model, student.optimizer, grid=grid)
        assert_same_state(whole_state(student, grid), middle, 0)
        run_step(student, grid)
        student.update()
        if dtype == "float32":  # the last bits of a bfloat16 pass, which a layout changes, may change a token's experts
            assert_same_state(whole_state(student, grid), end, 1e-4)
