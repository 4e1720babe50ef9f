"""Orders arrive in order, also while nobody waits for them."""

import threading
import time

import pytest
import torch.distributed as dist

from fire_megatron.parallel import control as module
from fire_megatron.parallel.control import Control


@pytest.fixture
def both(monkeypatch):
    """The two ends, over a store of this process."""
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    ends = []
    for speaks in (True, False):
        monkeypatch.setattr(module, "_numbers", iter([0]))
        ends.append(Control(store.clone(), speaks=speaks))
    yield ends
    del store  # which lives as long as it is held


def test_orders_come_in_order(both):
    here, there = both
    for i in range(300):
        here.announce(do="sample", rounds=i)
    for i in range(300):
        assert there.wait(lambda: None) == {"do": "sample", "rounds": i}


def test_orders_wait_and_are_waited_for(both):
    here, there = both
    idle = []
    thread = threading.Thread(target=lambda: (time.sleep(1.3), here.announce(do="stop", error=None)))
    thread.start()
    assert there.wait(lambda: idle.append(1)) == {"do": "stop", "error": None}
    thread.join()
    assert idle


def test_a_signal_goes_the_other_way(both):
    here, there = both
    assert here.asked_to_stop() is None
    there.ask_to_stop("SIGTERM")
    deadline = time.monotonic() + 10  # the store does not acknowledge what it is told
    while here.asked_to_stop() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert here.asked_to_stop() == "SIGTERM"


def test_reports_go_the_other_way_and_are_read_once(both):
    here, there = both
    assert here.reports() == []
    for i in range(3):
        there.report({"gpu/energy_j": ["Sum", i]})
    read, deadline = [], time.monotonic() + 10
    while len(read) < 3 and time.monotonic() < deadline:
        read += here.reports()
    assert read == [{"gpu/energy_j": ["Sum", i]} for i in range(3)]
    assert here.reports() == []
    there.report({})
    assert there.reports() == [], "only one rank reads"
