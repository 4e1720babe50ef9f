"""What a signal does to the process itself; that a run saves and continues is tested in tests/cli/test_signals.py."""

from __future__ import annotations

import os
import signal

import pytest

from fire_megatron.parallel.grid import GridFactory, Layout
from fire_megatron.platform import launch
from fire_megatron.train.interrupt import StopRequest


@pytest.fixture
def request_to_stop():
    """Installed, and taken away whatever happens."""
    request = StopRequest().install()
    yield request
    request.restore()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_the_first_signal_is_remembered(request_to_stop, number):
    assert request_to_stop.signal_name is None
    os.kill(os.getpid(), number)
    assert request_to_stop.signal_name == number.name


def test_a_second_ctrl_c_interrupts_at_once(request_to_stop):
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_repeated_sigterm_does_not_interrupt_the_save(request_to_stop):
    """Slurm and torchrun send it again while the run is saving."""
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
    assert request_to_stop.signal_name == "SIGTERM"


def test_signals_are_given_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    request = StopRequest().install()
    assert all(signal.getsignal(number) != handler for number, handler in before.items())
    request.restore()
    assert {number: signal.getsignal(number) for number in before} == before


def test_one_rank_agrees_with_itself(request_to_stop):
    launch.start("cpu", threads=1)
    try:
        group = GridFactory(timeout=60).grid(Layout()).span
        assert not request_to_stop.agreed(group=group) and request_to_stop.signal_name is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert request_to_stop.agreed(group=group) and request_to_stop.signal_name == "SIGTERM"
    finally:
        launch.stop()
