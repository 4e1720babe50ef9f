"""Student and teachers on ranks of their own, or sharing some: the same scores, loss and gradients as one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from cast import ESTIMATORS, Cast, assert_same_gradients
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import VOCABULARY
from roles import Spec, hf_response_logits, log_prob_and_entropy, reference
from steps import ROUTE, ROWS, make_rollouts, rollouts_of

from fire_megatron.config.loss import LossConfig
from fire_megatron.data.records import Prompt
from fire_megatron.parallel.grid import Layout
from fire_megatron.teachers.teacher import Teacher


def at(first, ranks, **sizes):
    return Layout(first_rank=first, num_ranks=ranks, **sizes)


STUDENTS = {
    "TP2": at(0, 2, tensor=2),
    "PP2": at(0, 2, pipeline=2),
    "TP1 DP2": at(0, 2),
    "CP2": at(0, 2, context=2),
}
TEACHERS = {
    "colocated TP2": {"math": at(0, 2, tensor=2), "code": at(0, 2, tensor=2)},
    "PP2 on its own span": {"math": at(2, 2, pipeline=2), "code": at(2, 2, pipeline=2)},
    "CP2 on its own span": {"math": at(2, 2, context=2), "code": at(2, 2)},
    "one rank each": {"math": at(2, 1), "code": at(3, 1)},
    "one rank each of the student's": {"math": at(1, 1), "code": at(0, 1)},
    "spans that overlap": {"math": at(1, 2, tensor=2), "code": at(0, 4, pipeline=2)},
}
LOSSES = ("sampled", "full", "topk")


@pytest.fixture(scope="module")
def alone(checkpoints, world, factory):
    """The step of each loss by one process that holds everything."""
    one = at(0, 1)
    made = {}
    for name in LOSSES:
        cast = Cast(checkpoints, world, factory, one, one, ESTIMATORS[name], mixed=name == "full")
        made[name] = cast.run(cast.step)
    return made


KINDS = {"TP2": ("full",), "PP2": ("full",), "TP1 DP2": LOSSES, "CP2": ("sampled",)}
"""Full brings states back to the student; what else there is to bring does not depend on its layout."""
CASES = [(student, teachers, loss) for student in STUDENTS for teachers in TEACHERS for loss in KINDS[student]]


@pytest.mark.world_size(4)
@pytest.mark.parametrize(("student", "teachers", "loss"), CASES)
def test_a_step_equals_that_of_a_single_process(checkpoints, world, factory, alone, student, teachers, loss):
    cast = Cast(
        checkpoints, world, factory, STUDENTS[student], TEACHERS[teachers], ESTIMATORS[loss], mixed=loss == "full",
        offload=student == "PP2",
    )  # fmt: skip
    # What the first left must not show in the second, which brings states where there are any.
    for _ in range(2 if loss == "full" else 1):
        scores, metrics, gradients = cast.run(cast.step)
        expected_scores, expected_metrics, expected_gradients = alone[loss]
        assert scores.keys() == expected_scores.keys() == set(range(ROWS))
        for row, pair in scores.items():
            for got, want in zip(pair, expected_scores[row], strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert abs(metrics["loss"]) > 1e-3
        assert metrics["loss"] == pytest.approx(expected_metrics["loss"], rel=1e-5)
        assert_same_gradients(gradients, expected_gradients, teachers)


SPECS = {
    "math": Spec("qwen3", seed=1, changes=(("num_hidden_layers", 5),)),
    "code": Spec("llama", seed=2, changes=(("hidden_size", 96), ("num_hidden_layers", 2), ("vocab_size", 320))),
}
ROUTER_LAYOUTS = {
    2: (
        (at(0, 2), {"math": at(0, 2), "code": at(0, 2, tensor=2)}),
        (at(0, 1), {"math": at(1, 1), "code": at(0, 2)}),
        (at(0, 2, tensor=2), {"math": at(0, 2, context=2), "code": at(0, 2, pipeline=2)}),
        (at(0, 2, pipeline=2), {"math": at(0, 1), "code": at(0, 2)}),
        (at(0, 2, context=2), {"math": at(0, 2, tensor=2), "code": at(1, 1)}),
    ),
    4: (
        (at(0, 1), {"math": at(1, 3), "code": at(1, 2)}),
        (at(0, 2), {"math": at(2, 2), "code": at(2, 2)}),
        (at(0, 3), {"math": at(3, 1), "code": at(0, 4)}),
        (at(0, 2, tensor=2), {"math": at(2, 2), "code": at(0, 4, tensor=2)}),
        (at(0, 4), {"math": at(0, 4), "code": at(0, 2)}),
        (at(0, 2, context=2), {"math": at(1, 2, context=2), "code": at(0, 4, context=2)}),
    ),
}


@pytest.fixture(scope="module")
def casts(checkpoints, world, factory):
    pairs = ROUTER_LAYOUTS[4 if world.size % 4 == 0 else 2]
    return [Cast(checkpoints, world, factory, student, teachers, LossConfig()) for student, teachers in pairs]


@pytest.mark.world_size(2)
@given(
    layout=st.integers(0, 29),
    described=st.lists(st.tuples(st.sampled_from(sorted(ROUTE)), st.integers(1, 9), st.integers(0, 30)), max_size=14),
    shuffle=st.randoms(use_true_random=False),
)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,  # the same examples on all ranks
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_each_row_is_scored_once_by_its_teacher_in_order_and_evenly(casts, monkeypatch, layout, described, shuffle):
    cast = casts[layout % len(casts)]
    generator = torch.Generator().manual_seed(len(described))

    def draw(n):
        return torch.randint(6, VOCABULARY, (n,), generator=generator)

    whole = [(label, draw(p), draw(r)) for label, p, r in described]
    order = list(range(len(whole)))
    shuffle.shuffle(order)
    loads = {}
    computed = {name: [] for name in SPECS}
    named = {id(teacher): name for name, teacher in cast.pool.teachers.items()}
    real = Teacher._score_share

    def listening(teacher, prompts, responses, lengths, share, *rest):
        name = named[id(teacher)]
        computed[name] += [(tuple(prompts[i].tolist()), tuple(responses[i].tolist())) for i in share]
        loads[name] = loads.get(name, 0) + sum(lengths[i] for i in share)
        return real(teacher, prompts, responses, lengths, share, *rest)

    def work():
        mine = [order[i] for i in cast.grid.own_rows(len(whole))]
        prompts = [
            Prompt(i, label, tuple(prompt.tolist()[:-1]), "", views=(("math", (6,)), ("code", tuple(prompt.tolist()))))
            if ROUTE[label] == "code"  # the student's prompt is shorter than that which this teacher is given
            else Prompt(i, label, tuple(prompt.tolist()), "")
            for i, (label, prompt, _) in enumerate(whole)
        ]
        rollouts = make_rollouts(mine, prompts, [response for *_, response in whole])
        scores = cast.score(rollouts, len(whole))
        assert scores.teachers == tuple(ROUTE[whole[i][0]] for i in mine)
        return cast.gathered(scores, rollouts)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "_score_share", listening)
        scores = cast.run(work)
    assert sorted(scores) == list(range(len(whole)))
    for row, (log_probs, entropies) in scores.items():
        label, prompt, response = whole[row]
        logits = hf_response_logits(reference(SPECS[ROUTE[label]]), prompt, response)[:, :VOCABULARY]
        expected = log_prob_and_entropy(logits, response)
        torch.testing.assert_close(log_probs.double(), expected[0], rtol=0, atol=5e-5)
        torch.testing.assert_close(entropies.double(), expected[1], rtol=0, atol=5e-5)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (computed, loads))
    for name in SPECS:
        info = cast.pool.infos[name].layout
        replicas = [info.last_stage_of(replica, 0) for replica in range(info.data)]
        rows_of = [row for rank in replicas for row in everyone[rank][0][name]]
        wanted = [(tuple(p.tolist()), tuple(r.tolist())) for label, p, r in whole if ROUTE[label] == name]
        assert sorted(rows_of) == sorted(wanted)
        tokens = [everyone[rank][1].get(name, 0) for rank in replicas]
        longest = max((len(p) + len(r) for p, r in wanted), default=0)
        assert max(tokens) - min(tokens) <= longest


@pytest.mark.world_size(4)
def test_an_abandoned_session_leaves_the_teachers_free(checkpoints, world, factory):
    cast = Cast(checkpoints, world, factory, at(0, 2), {"math": at(2, 1), "code": at(3, 1)}, LossConfig())

    def work():
        rollouts = rollouts_of(cast.grid.own_rows(ROWS))
        session = cast.router.open(rollouts.prompts, rollouts.row_ids, total=ROWS)
        session.send(rollouts.row_ids[:2], rollouts.responses[:2])
        session.drain()
        return cast.gathered(cast.score(rollouts, ROWS), rollouts)

    one = at(0, 1)
    single = Cast(checkpoints, world, factory, one, one, LossConfig())
    expected = single.run(lambda: single.gathered(single.score(r := rollouts_of(range(ROWS)), ROWS), r))
    scores = cast.run(work)
    assert scores.keys() == expected.keys()
    for row, pair in scores.items():
        torch.testing.assert_close(pair, expected[row], rtol=1e-5, atol=1e-5)
