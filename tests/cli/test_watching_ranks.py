"""Processes that watch one another, with the store in rank 0 as under srun: who is blamed, who leaves, and how.

Most of the time they wait, so all courses run side by side, in forks of a process that has done the imports.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import watched_rank
from processes import free_ports

from fire_megatron.platform.watch import EXIT_CODE

TIMEOUT = 8.0
"""Of the watches, seconds."""
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch.distributed", "fire_megatron.parallel.control", "fire_megatron.platform.watch"])


class Ranks:
    """Some ranks, each with a behaviour of its own."""

    def __init__(self, folder: Path, port: int, *behaviours: str, timeout: float = TIMEOUT) -> None:
        """Starts them and waits until all of them work."""
        size = len(behaviours)
        self.files = [str(folder / f"{port}-{rank}") for rank in range(size)]
        self.started = [
            FORKS.Process(target=watched_rank.run, args=(files, rank, size, port, behaviour, timeout), daemon=True)
            for rank, (files, behaviour) in enumerate(zip(self.files, behaviours, strict=True))
        ]
        for process in self.started:
            process.start()
        deadline = time.monotonic() + 90
        while not all("ready" in self.said(rank, ".out") or self.started[rank].exitcode for rank in range(size)):
            assert time.monotonic() < deadline, [self.said(rank, ".err") for rank in range(size)]
            time.sleep(0.02)

    def said(self, rank: int, where: str) -> str:
        """What a rank has printed so far: ``.out`` or ``.err``."""
        path = Path(self.files[rank] + where)
        return path.read_text() if path.exists() else ""

    def kill(self, rank: int, number: int) -> None:
        """Send a signal."""
        os.kill(self.started[rank].pid, number)

    def codes(self, ranks: range | None = None) -> tuple[list[int], float]:
        """Exit codes of these ranks, or of all, and how long it took them."""
        began = time.monotonic()
        waited = [self.started[rank] for rank in ranks or range(len(self.started))]
        for process in waited:
            process.join(60)
        return [process.exitcode for process in waited], time.monotonic() - began

    def errors(self) -> list[list[str]]:
        """Error lines of each."""
        texts = [self.said(rank, ".err") for rank in range(len(self.files))]
        return [[line for line in text.splitlines() if line.startswith("error")] for text in texts]


COURSES: dict[str, Callable] = {}


def course(function: Callable) -> Callable:
    """Each begins with the function that starts its ranks, and fails as a test does."""
    COURSES[function.__name__] = function
    return function


@course
def a_good_end_is_one_on_every_rank(start):
    ranks = start("end", "end", "end")
    assert ranks.codes()[0] == [0] * 3 and ranks.errors() == [[]] * 3


def _silent(start, number):
    ranks = start("work", "work", "work")
    ranks.kill(2, number)
    codes, seconds = ranks.codes(range(2))
    assert codes == [EXIT_CODE] * 2 and TIMEOUT / 2 - 1 < seconds < TIMEOUT + 4
    [line] = [line for lines in ranks.errors() for line in lines]
    assert "rank 2 (role2): working" in line


@course
def a_killed_rank_is_named_once_and_all_leave(start):
    _silent(start, signal.SIGKILL)


@course
def a_stopped_rank_is_named_once_and_all_leave(start):
    _silent(start, signal.SIGSTOP)


@course
def who_fails_is_heard_once_beside_itself(start):
    ranks = start("work", "fail", "work")
    assert ranks.codes()[0] == [EXIT_CODE, 7, EXIT_CODE]
    assert ranks.errors() == [["error: made up"], [], []]


@course
def rank_0_fails_and_the_others_do_not_take_it_for_a_death(start):
    ranks = start("fail", "work", "work")
    assert ranks.codes()[0] == [7, EXIT_CODE, EXIT_CODE] and ranks.errors() == [[]] * 3


@course
def the_store_goes_with_rank_0(start):
    ranks = start("work", "work")
    ranks.kill(0, signal.SIGKILL)
    codes, seconds = ranks.codes(range(1, 2))
    assert codes == [EXIT_CODE] and seconds < TIMEOUT
    assert "the store where the ranks meet does not answer" in ranks.errors()[1][0]


@course
def what_is_being_saved_is_finished(start):
    ranks = start("save", "fail", timeout=30.0)
    assert ranks.codes()[0] == [EXIT_CODE, 7] and "saved" in ranks.said(0, ".out")


@course
def a_save_that_takes_longer_than_half_the_timeout_is_not_waited_for(start):
    ranks = start("save", "fail")
    assert watched_rank.SAVING > TIMEOUT / 2
    assert ranks.codes()[0] == [EXIT_CODE, 7] and "saved" not in ranks.said(0, ".out")


@course
def silence_tells_sooner_after_a_signal_also_where_the_main_thread_is_in_cpp(start):
    ranks = start("blocked", "work", timeout=120.0)
    ranks.kill(1, signal.SIGKILL)
    time.sleep(0.5)
    ranks.kill(0, signal.SIGTERM)  # as a launcher does, to a process that catches it
    assert ranks.codes(range(1))[1] < 20 and "rank 1 (role1): working" in ranks.said(0, ".err")


@course
def silence_tells_sooner_after_a_failed_collective(start):
    """NCCL's fail when a peer dies, long before torch ends that rank."""
    ranks = start("blocked", "work", "failed", timeout=120.0)
    ranks.kill(1, signal.SIGKILL)
    codes, seconds = ranks.codes(range(0, 3, 2))
    assert seconds < 20 and codes[1] == EXIT_CODE and "rank 1 (role1): working" in ranks.said(0, ".err")


@course
def a_rank_that_lives_but_does_not_get_on_ends_the_run(start):
    """Others that get on, or wait for those that do, are not blamed."""
    ranks = start("waiting", "work", "busy", timeout=4.0)
    codes, seconds = ranks.codes()
    assert codes == [EXIT_CODE] * 3 and seconds < 10
    [line], *others = ranks.errors()
    assert others == [[], []], "told once"
    assert "no progress for" in line and "run.collective_timeout (4 s)" in line
    stalled, rest = line.split("Stalled: ")[1].split("Others: ")
    assert "rank 1 (role1): working for" in stalled and "rank 0" not in stalled
    assert "rank 0 (role0): waiting for others" in rest and "in parallel/control.py:" in rest
    assert "rank 2 (role2): working" in rest


@course
def all_wait_for_one_another(start):
    ranks = start("waiting", "waiting", timeout=3.0)
    ranks.codes()
    [line], _ = ranks.errors()
    assert "rank 0 (role0)" in line and "rank 1 (role1)" in line and "Others" not in line


@course
def who_waits_for_one_that_gets_on_may_wait(start):
    ranks = start("waiting", "busy", timeout=2.0)
    time.sleep(6)
    assert [process.exitcode for process in ranks.started] == [None, None]


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """Every course, in a thread of its own; no process is left behind."""
    folder, made = tmp_path_factory.mktemp("watch"), []

    def start(port, *behaviours, **options):
        made.append(Ranks(folder, port, *behaviours, **options))
        return made[-1]

    # Drawn together: a port that is free again might be given to two.
    ports = dict(zip(COURSES, free_ports(len(COURSES)), strict=True))
    with ThreadPoolExecutor(len(COURSES)) as pool:
        yield {name: pool.submit(function, partial(start, ports[name])) for name, function in COURSES.items()}
    for process in (process for ranks in made for process in ranks.started):
        process.kill()
        process.join()


@pytest.mark.parametrize("name", COURSES)
def test_course(running, name):
    running[name].result(timeout=180)
