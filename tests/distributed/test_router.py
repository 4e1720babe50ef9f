"""Each row is scored once, by its own teacher, and its scores come back to it: whatever the layouts and the order."""

import itertools
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import VOCABULARY
from roles import Roles, Spec, hf_response_logits, layouts, log_prob_and_entropy, make_router, reference, score, share

from fire_megatron.data.records import Prompt
from fire_megatron.data.rollouts import Rollouts
from fire_megatron.parallel.collectives import all_gather_stacked
from fire_megatron.parallel.grid import Layout
from fire_megatron.teachers.teacher import Teacher

pytestmark = pytest.mark.world_size(2)  # teachers of 2 tensor ranks and of 2 stages

SPECS = {
    "math": Spec("qwen3", seed=1, changes=(("num_hidden_layers", 5),)),
    "code": Spec("llama", seed=2, changes=(("hidden_size", 96), ("num_hidden_layers", 2))),
    "chat": Spec("mistral-window", seed=3),
}
"""Teachers of other depth, width and family than one another."""
ROUTE = {"algebra": "math", "geometry": "math", "python": "code", "small talk": "chat"}
LABELS = ("algebra", "python", "geometry", "small talk", "python", "algebra", "python")
ROWS = 11


@pytest.fixture(scope="module")
def roles(world, tmp_path_factory):
    return Roles(world, Path(share(str(tmp_path_factory.mktemp("models")))))


@pytest.fixture(scope="module")
def teachers(roles, world_size):
    """Three teachers in three layouts: context (at 4 ranks and pipeline), data and tensor (and pipeline) parallel."""
    stages = 2 if world_size % 4 == 0 else 1
    shapes = {
        "math": Layout(context=2, pipeline=stages, num_ranks=world_size),
        "code": Layout(num_ranks=world_size),
        "chat": Layout(tensor=2, pipeline=stages, num_ranks=world_size),
    }
    built = {}
    for name, layout in shapes.items():
        model, grid = roles.build(SPECS[name], layout)
        built[name] = Teacher(model, grid, micro_batch_tokens=24)
    return built


def make_rows():
    """(label, prompt, response) of every row; some responses are empty, one is longer than a micro-batch."""
    generator = torch.Generator().manual_seed(6)

    def draw(n):
        return torch.randint(6, VOCABULARY, (n,), generator=generator)

    sizes = [(3 * i) % 10 for i in range(ROWS)]
    sizes[1] = 30
    return [(LABELS[i % len(LABELS)], draw(1 + (5 * i) % 8), draw(sizes[i])) for i in range(ROWS)]


def rollouts_of(rows, mine):
    """A replica's rollouts: the rows ``mine``, in that order, with made-up student statistics."""
    return Rollouts(
        row_ids=tuple(mine),
        prompts=tuple(Prompt(i, rows[i][0], tuple(rows[i][1].tolist()), "") for i in mine),
        responses=tuple(rows[i][2] for i in mine),
        log_probs=tuple(torch.zeros(len(rows[i][2])) for i in mine),
        entropies=tuple(torch.zeros(len(rows[i][2])) for i in mine),
        truncated=tuple(False for _ in mine),
        weight_version=0,
    )


def deal(rows, replicas, seed):
    """Rows of each replica in a random order and uneven numbers; replicas may get none."""
    shuffler = random.Random(seed)
    shares = [[] for _ in range(replicas)]
    for row in shuffler.sample(range(rows), rows):
        shares[shuffler.randrange(replicas) if seed else 0].append(row)
    return shares


def gathered(scores, mine):
    """(teacher, log-probs, entropies) of every row, from all ranks; ranks that hold the same row agree."""
    parts = [None] * dist.get_world_size()
    own = dict(zip(mine, zip(scores.teachers, scores.log_probs, scores.entropies, strict=True), strict=True))
    dist.all_gather_object(parts, own)
    whole = {}
    for part in parts:
        for row, (name, log_probs, entropies) in part.items():
            first = whole.setdefault(row, (name, log_probs, entropies))
            assert first[0] == name and torch.equal(first[1], log_probs) and torch.equal(first[2], entropies)
    return whole


class Watch:
    """Counts what teachers are asked and which rows their models compute."""

    def __init__(self, teachers, monkeypatch):
        """Wraps ``Teacher.score`` and listens to each model's forward passes."""
        self.asked = {name: Counter() for name in teachers}
        self.computed = {name: Counter() for name in teachers}
        real, named = Teacher.score, {id(teacher): name for name, teacher in teachers.items()}

        def score(teacher, prompts, responses, **options):
            rows = zip(prompts, responses, strict=True)
            self.asked[named[id(teacher)]].update((*p.tolist(), *r.tolist()) for p, r in rows)
            return real(teacher, prompts, responses, **options)

        monkeypatch.setattr(Teacher, "score", score)
        self.handles = [
            t.model.register_forward_pre_hook(self.listener(name, t.grid), with_kwargs=True)
            for name, t in teachers.items()
        ]

    def listener(self, name, grid):
        """A hook that counts the sequences of each pack, once a replica."""

        def hook(model, args, kwargs):
            packed, tokens = kwargs["packed"], args[0][0]
            if packed.order is not None:
                tokens = all_gather_stacked(tokens, group=grid.pg.cp).flatten()[packed.order]
            assert len(tokens) == grid.layout.context * args[0].shape[1]  # each context rank has its part
            rows = [tokens[s:e].tolist() for s, e in itertools.pairwise(packed.whole.tolist())]
            if grid.is_first_stage and grid.tp_rank == grid.cp_rank == 0:
                # No token of a row is 0, which padding is.
                self.computed[name].update(tuple(filter(None, row)) for row in rows if any(row))

        return hook

    def close(self):
        """Stop listening; what all ranks' models computed."""
        for handle in self.handles:
            handle.remove()
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, self.computed)
        return {name: sum((part[name] for part in parts), Counter()) for name in self.computed}


def assert_equals_transformers(whole, rows):
    """Every row has its own teacher's exact log-probs and entropies."""
    assert sorted(whole) == list(range(len(rows)))
    for row, (name, log_probs, entropies) in whole.items():
        label, prompt, response = rows[row]
        assert name == ROUTE[label] and log_probs.shape == entropies.shape == response.shape
        logits = hf_response_logits(reference(SPECS[name]), prompt, response)
        expected = log_prob_and_entropy(logits, response)
        torch.testing.assert_close(log_probs.double(), expected[0], rtol=0, atol=5e-5)
        torch.testing.assert_close(entropies.double(), expected[1], rtol=0, atol=5e-5)


def test_scores_equal_each_rows_own_teacher(roles, teachers, world_size):
    rows = make_rows()
    for layout in layouts(world_size, contexts=(1, 2)):
        grid = roles.factory.grid(layout)
        mine = deal(ROWS, grid.row_replicas, seed=1)[grid.row_replica]
        router = make_router(teachers, ROUTE, grid, roles.factory)
        scores = score(router, rollouts_of(rows, mine))
        assert_equals_transformers(gathered(scores, mine), rows)


def test_each_row_is_computed_once_by_its_own_teacher(roles, teachers, world_size, monkeypatch):
    rows = make_rows()
    expected = {name: Counter() for name in SPECS}
    for label, prompt, response in rows:
        expected[ROUTE[label]][(*prompt.tolist(), *response.tolist())] += 1
    for layout in layouts(world_size, contexts=(1, 2)):
        grid = roles.factory.grid(layout)
        mine = deal(ROWS, grid.row_replicas, seed=2)[grid.row_replica]
        with monkeypatch.context() as patch:
            watch = Watch(teachers, patch)
            router = make_router(teachers, ROUTE, grid, roles.factory)
            score(router, rollouts_of(rows, mine))
            assert watch.close() == expected, layout
            assert watch.asked == expected, layout


def test_order_and_sharing_out_change_nothing(roles, teachers, world_size):
    rows, grid = make_rows(), roles.factory.grid(Layout(num_ranks=world_size))
    router, first = make_router(teachers, ROUTE, grid, roles.factory), None
    for seed in range(4):  # seed 0: one replica holds every row
        mine = deal(ROWS, world_size, seed)[grid.row_replica]
        whole = gathered(score(router, rollouts_of(rows, mine)), mine)
        first = first or whole
        assert sorted(whole) == list(range(ROWS))
        for row, (name, log_probs, entropies) in whole.items():
            assert name == first[row][0]
            assert torch.equal(log_probs, first[row][1]) and torch.equal(entropies, first[row][2])


@pytest.mark.parametrize("absent", ["math", "code", "chat"])
def test_a_teacher_without_rows(roles, teachers, world_size, monkeypatch, absent):
    rows = [row for row in make_rows() if ROUTE[row[0]] != absent]
    for layout in (layouts(world_size)[0], layouts(world_size)[-1]):
        grid = roles.factory.grid(layout)
        mine = deal(len(rows), grid.row_replicas, seed=3)[grid.row_replica]
        router = make_router(teachers, ROUTE, grid, roles.factory)
        with monkeypatch.context() as patch:
            watch = Watch(teachers, patch)
            scores = score(router, rollouts_of(rows, mine))
            assert not watch.close()[absent] and not watch.asked[absent]
        assert_equals_transformers(gathered(scores, mine), rows)


def test_fewer_rows_than_replicas(roles, teachers, world_size):
    # One row, of a teacher with a replica on every rank: the other replicas have nothing to compute.
    rows = [row for row in make_rows() if ROUTE[row[0]] == "code"][:1]
    grid = roles.factory.grid(Layout(num_ranks=world_size))
    mine = [0] if grid.row_replica == world_size - 1 else []
    router = make_router(teachers, ROUTE, grid, roles.factory)
    scores = score(router, rollouts_of(rows, mine))
    assert len(scores) == len(mine)
    assert_equals_transformers(gathered(scores, mine), rows)
