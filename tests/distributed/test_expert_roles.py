"""Mixtures of experts as teachers and in whole runs: scoring, generation, resuming, also where replicas that share
experts hold unequal numbers of rows."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from experts import AUXILIARY, SPEC, draw_rows, expert_layouts, make_student, run_step
from models import save_megatron
from roles import (
    Spec,
    assert_same_state,
    hf_response_logits,
    log_prob_and_entropy,
    reference,
    share,
    whole_state,
)
from steps import save_state
from tiny_run import make_inputs, read_metrics, tiny_recipe

from fire_megatron.checkpoint.resuming import load_training_state
from fire_megatron.config.checks import check_recipe
from fire_megatron.config.load import recipe_from_dict
from fire_megatron.data.records import Prompt
from fire_megatron.platform import launch
from fire_megatron.rollout.engine import MegatronEngine
from fire_megatron.rollout.sampling import Sampling
from fire_megatron.teachers.teacher import Teacher
from fire_megatron.train.lifecycle import Trainer

MACHINE = ("time/", "memory/", "rollout/tokens_per_second", "teacher/", "router/")
"""Metrics of the machine; and the teachers' traffic, which depends on the student's tensor size."""


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
        teacher = Teacher(model, grid, micro_batch_tokens=12)
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
    for layout in expert_layouts(world_size)[-2:]:
        model, grid = roles.build(spec, layout)
        scored = Teacher(model, grid, micro_batch_tokens=64).score(prompts, responses)
        for prompt, response, ours in zip(prompts, responses, scored.log_probs, strict=True):
            logits = hf_response_logits(reference(spec), prompt, response)
            torch.testing.assert_close(ours.double(), log_prob_and_entropy(logits, response)[0], rtol=0, atol=3e-5)


def generate(model, grid, prompts, rows, *, stop_ids=(), batch_size=0):
    """Greedy responses by row, put together from all replicas."""
    sampling = Sampling(max_new_tokens=9, temperature=0.0, stop_ids=frozenset(stop_ids), batch_size=batch_size)
    mine = [rows[i] for i in grid.own_rows(len(rows))]
    made = MegatronEngine(model, grid).generate([prompts[i] for i in mine], mine, sampling=sampling, step=0)
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, dict(zip(mine, (r.tolist() for r in made.responses), strict=True)))
    return {row: tokens for part in gathered for row, tokens in part.items()}


def test_generation_of_uneven_rows(roles, world_size):
    prompts = [Prompt(i, "math", tuple(p.tolist()), "") for i, p in enumerate(draw_rows(7)[0])]
    expected = None
    *_, split, spread = every = expert_layouts(world_size)
    for layout in every:
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
        if layout not in (split, spread):
            continue
        assert generate(model, grid, prompts, range(7), stop_ids=stops, batch_size=2) == cut, layout
        # Fewer rows than replicas, and none at all.
        assert generate(model, grid, prompts, [4], stop_ids=stops) == {4: cut[4]}, layout
        assert generate(model, grid, prompts, []) == {}, layout


def write_inputs(folder):
    """A student and a teacher with experts, a teacher without."""
    folder.mkdir()
    make_inputs(folder)
    for name, seed in (("student", 0), ("math", 1)):
        shutil.rmtree(folder / name)
        save_megatron("qwen3-moe", folder / f"{name}-experts", seed=seed, num_hidden_layers=2)
        (folder / f"{name}-experts").rename(folder / name)


def run_layouts(size):
    """Recipe changes: all roles on all ranks in three layouts; a teacher with experts on ranks of its own."""
    first, *_, split, spread = expert_layouts(size)
    for layout in (first, split, spread):
        parallel = {"tensor": layout.tensor, "pipeline": layout.pipeline, "expert": layout.expert}
        yield {"student__parallel": parallel, "teachers__math__parallel": {"expert": layout.expert}}
    if size % 4 == 0:
        half, pair = size // 2, {"expert": 2}
        yield {
            "student__ranks": f"0-{half - 1}",
            "student__parallel": pair,
            "teachers__math__ranks": f"{half}-{size - 1}",
            "teachers__math__parallel": pair,
        }


def test_a_run_does_not_depend_on_the_layout(world, roles, world_size):
    """Student and a teacher with experts through whole steps: sampling, scoring, training, evaluation, saving."""
    folder, expected = roles.folder / "run", None
    if world.is_main:
        write_inputs(folder)
    dist.barrier()
    watch = launch.watch(world, roles="student, teachers", timeout=60.0)
    for number, layout in enumerate(run_layouts(world_size)):
        changes = {
            **layout,
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
    saved = save_state(student, grid, source=folder, checkpoints=checkpoints)
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
