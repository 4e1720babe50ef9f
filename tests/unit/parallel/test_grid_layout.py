"""Layouts and the groups that they make, seen from every rank of a world that exists in name only."""

from __future__ import annotations

import datetime

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from fire_megatron.parallel.grid import GridFactory, Layout
from fire_megatron.platform import cpu_seam


@pytest.mark.parametrize(
    ("sizes", "data"),
    [
        ({}, 1),
        ({"num_ranks": 8}, 8),
        ({"tensor": 2, "num_ranks": 8}, 4),
        ({"tensor": 2, "pipeline": 2, "num_ranks": 8}, 2),
        ({"tensor": 2, "pipeline": 2, "context": 2, "num_ranks": 8}, 1),
        ({"pipeline": 3, "num_ranks": 6, "first_rank": 5}, 2),
        ({"tensor": 4, "expert": 2, "num_ranks": 8}, 2),  # experts share the data-parallel ranks
    ],
)
def test_data_parallelism_fills_the_span(sizes, data):
    layout = Layout(**sizes)
    assert layout.data == data and layout.model_ranks * data == layout.num_ranks


class World:
    """This process as one of many ranks, in groups that never communicate."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def __enter__(self):
        cpu_seam.install()
        dist.init_process_group("fake", store=FakeStore(), rank=self.rank, world_size=self.size)
        return self

    def __exit__(self, *exc):
        dist.destroy_process_group()


def groups_of(layout, size):
    """For every rank of the span and every group, the ranks in it."""
    found = {}
    for rank in range(layout.first_rank, layout.first_rank + layout.num_ranks):
        with World(rank, size):
            grid = GridFactory(timeout=60).grid(layout)
            assert grid.is_member
            names = [name for name in vars(grid.pg) if isinstance(getattr(grid.pg, name), dist.ProcessGroup)]
            found[rank] = {name: dist.get_process_group_ranks(getattr(grid.pg, name)) for name in names}
            found[rank]["span"] = dist.get_process_group_ranks(grid.span)
            place = (grid.tp_rank, grid.dp_rank, grid.pp_rank)
            found[rank]["place"] = [*place, grid.is_first_stage, grid.is_last_stage, grid.last_stage_rank]
    return found


def test_groups_of_a_span():
    """Tensor ranks are neighbours, then replicas, then stages, as in megatron-core."""
    layout = Layout(tensor=2, pipeline=3, first_rank=2, num_ranks=12)
    groups = groups_of(layout, size=16)
    for index, (rank, mine) in enumerate(sorted(groups.items())):
        tensor, data, stage = index % 2, index // 2 % 2, index // 4
        last = 2 + tensor + 2 * data + 8
        assert mine["place"] == [tensor, data, stage, stage == 0, stage == 2, last], rank
        assert mine["tp"] == [rank - tensor, rank - tensor + 1]
        assert mine["dp"] == mine["dp_cp"] == [2 + tensor + 4 * stage, 4 + tensor + 4 * stage]
        assert mine["pp"] == [2 + tensor + 2 * data + 4 * s for s in range(3)]
        assert mine["mp"] == sorted(2 + t + 2 * data + 4 * s for t in range(2) for s in range(3))
        assert mine["tp_dp_cp"] == [2 + 4 * stage + i for i in range(4)]
        assert mine["span"] == mine["intra_dist_opt"] == list(range(2, 14))
        assert mine["cp"] == mine["ep"] == [rank]
        if stage != 1:
            assert mine["embd"] == [mine["pp"][0], mine["pp"][-1]], "tied embeddings: first and last stage"
        if stage == 0:
            assert mine["pos_embd"] == [rank]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tensor=2, context=2, num_ranks=8),
        Layout(tensor=2, expert=2, num_ranks=8),
        Layout(tensor=1, pipeline=2, context=2, num_ranks=8),
    ],
)
def test_every_group_is_the_same_for_all_its_members(layout):
    groups = groups_of(layout, size=8)
    for rank, mine in groups.items():
        for name, ranks in mine.items():
            if name != "place":
                assert rank in ranks or name in ("embd", "pos_embd")
                assert all(groups[other][name] == ranks for other in ranks), (rank, name)
        assert len(mine["cp"]) == layout.context and len(mine["ep"]) == layout.expert
        assert len(mine["dp_cp"]) == layout.context * layout.data


def test_a_rank_outside_the_span_is_no_member():
    with World(3, 4):
        grid = GridFactory(timeout=60).grid(Layout(num_ranks=2))
        assert not grid.is_member


def test_equal_layouts_share_their_groups():
    """A process group costs memory and connections; a teacher laid out as the student needs none of its own."""
    with World(0, 4):
        factory = GridFactory(timeout=60)
        student = factory.grid(Layout(tensor=2, num_ranks=4))
        assert factory.grid(Layout(tensor=2, num_ranks=4)) is student
        other = factory.grid(Layout(tensor=4, num_ranks=4))
        assert other is not student and other.pg.tp is other.span is student.span


def test_groups_take_the_timeout_of_the_run(monkeypatch):
    taken, new_group = set(), dist.new_group

    def record(ranks, timeout):
        taken.add(timeout)
        return new_group(ranks, timeout=timeout)

    monkeypatch.setattr(dist, "new_group", record)
    with World(0, 2):
        GridFactory(timeout=80).grid(Layout(tensor=2, num_ranks=2))
    assert taken == {datetime.timedelta(seconds=100)}, "somewhat longer, so that the watch speaks first"
