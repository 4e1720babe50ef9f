"""One launch for all distributed tests: ``torchrun --nproc-per-node N -m pytest tests/distributed``.

Each test works at any world size above 1. Ranks run the tests in the same order, each in its own pytest. The first
failure on any rank ends that rank's session at once: the others may be waiting in a collective that it will not join,
so going on would pair up the collectives of different tests. torchrun then ends the other ranks and exits non-zero;
without torchrun's help they run into the collective timeout.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from roles import Roles, share
from steps import write_checkpoints
from torch.distributed.distributed_c10d import _world

from fire_megatron.parallel.grid import GridFactory
from fire_megatron.platform import launch

TIMEOUT = 60.0
"""Seconds before a stalled collective fails."""

HERE = Path(__file__).parent


def launched_size() -> int:
    """Ranks that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, alike on every rank, what this world size cannot run."""
    size = launched_size()
    for item in items:
        if HERE not in item.path.parents:
            continue
        marker = item.get_closest_marker("world_size")
        if size == 1:
            item.add_marker(pytest.mark.skip(reason="needs several ranks: torchrun --nproc-per-node 2 -m pytest ..."))
        elif item.get_closest_marker("two_ranks") and size > 2:
            item.add_marker(pytest.mark.skip(reason="more ranks say no more than 2 do"))
        elif marker is not None and size % marker.args[0]:
            item.add_marker(pytest.mark.skip(reason=f"needs a multiple of {marker.args[0]} ranks, not {size}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """End this rank's session, with a non-zero exit, at its first failure."""
    report = yield
    if report.failed and launched_size() > 1:
        item.session.shouldfail = f"rank {os.environ.get('RANK')} failed {item.nodeid}; the others cannot go on"
    return report


@pytest.fixture(scope="session", autouse=True)
def world() -> Iterator[launch.World | None]:
    """Join the run, as a run of the program does (gloo, CPU seam), and leave it at the end."""
    if launched_size() == 1:
        yield None
        return
    yield launch.start("cpu", timeout=TIMEOUT)
    launch.stop()


@pytest.fixture(scope="module", autouse=True)
def leave_groups(world: launch.World | None) -> Iterator[None]:
    """Leave the groups of ranks that a module has made: each keeps threads that look for messages all the time, and
    some hundreds of them would take most of a core."""
    before = set(_world.pg_map)
    yield
    if world is not None:
        dist.barrier()
        for group in [group for group in _world.pg_map if group not in before]:
            dist.destroy_process_group(group)


@pytest.fixture(scope="session")
def session_folder(world: launch.World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all ranks see."""
    return Path(share(str(tmp_path_factory.mktemp("session"))))


@pytest.fixture(scope="module")
def folder(world: launch.World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the module that all ranks see."""
    return Path(share(str(tmp_path_factory.mktemp("module"))))


@pytest.fixture(scope="module")
def roles(world: launch.World, session_folder: Path) -> Roles:
    """Builds roles in any layout; what is converted for one module serves all."""
    return Roles(world, session_folder)


@pytest.fixture(scope="module")
def factory(world: launch.World) -> GridFactory:
    """One set of process groups for the module."""
    return GridFactory(timeout=TIMEOUT)


@pytest.fixture(scope="session")
def checkpoints(world: launch.World, session_folder: Path) -> Path:
    """Student and two teachers of other depth and width, written by rank 0, seen by all."""
    if world.is_main:
        write_checkpoints(session_folder)
    dist.barrier()
    return session_folder


@pytest.fixture(scope="session")
def world_size() -> int:
    """Number of ranks."""
    return launched_size()


@pytest.fixture(scope="session")
def rank(world: launch.World) -> int:
    """This process's rank."""
    return world.rank


@pytest.fixture(scope="module")
def subgroup(world: launch.World) -> Callable[[int], dist.ProcessGroup]:
    """Factory: size -> this rank's group among blocks of that many consecutive ranks. Collective over the world."""
    groups: dict[int, dist.ProcessGroup] = {}

    def make(size: int) -> dist.ProcessGroup:
        assert world.size % size == 0, f"blocks of {size} do not cover {world.size} ranks"
        if size not in groups:
            for first in range(0, world.size, size):
                ranks = list(range(first, first + size))
                group = dist.new_group(ranks, timeout=datetime.timedelta(seconds=TIMEOUT))
                if world.rank in ranks:
                    groups[size] = group
        return groups[size]

    return make


@pytest.fixture(scope="module")
def group(subgroup: Callable[[int], dist.ProcessGroup], world_size: int) -> dist.ProcessGroup:
    """All ranks."""
    return subgroup(world_size)
