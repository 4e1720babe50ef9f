"""Generators that a checkpoint saves: after a restore, all of them draw what they would have drawn."""

from __future__ import annotations

import random

import numpy
import torch

from fire_megatron.platform.device import Device
from fire_megatron.platform.rng import get_rng_state, seed_everything, set_rng_state

CPU = Device("cpu")


def draw():
    """From each generator; the second normal number comes from a cache that is part of numpy's state."""
    return [random.random(), random.gauss(0, 1), *numpy.random.randn(3), *torch.randn(3).tolist()]


def test_seeding():
    seed_everything(7, device=CPU)
    first = draw()
    seed_everything(7, device=CPU)
    assert draw() == first
    seed_everything(8, device=CPU)
    assert all(a != b for a, b in zip(draw(), first, strict=True))
    seed_everything(2**40 + 7, device=CPU)  # numpy takes 32 bits only
    draw()


def test_restoring_after_a_trip_through_a_file(tmp_path):
    """The file is read with ``weights_only``, which admits no classes of numpy's."""
    seed_everything(7, device=CPU)
    draw()
    torch.save(get_rng_state(device=CPU), tmp_path / "state.pt")
    expected = draw() + draw()
    seed_everything(99, device=CPU)
    set_rng_state(torch.load(tmp_path / "state.pt", weights_only=True), device=CPU)
    assert draw() + draw() == expected


def test_saving_draws_nothing():
    seed_everything(7, device=CPU)
    expected = draw()
    seed_everything(7, device=CPU)
    get_rng_state(device=CPU)
    assert draw() == expected


def test_the_state_of_a_gpu_run_restores_on_a_cpu():
    seed_everything(7, device=CPU)
    state = get_rng_state(device=CPU)
    expected = draw()
    set_rng_state({**state, "cuda": torch.zeros(16, dtype=torch.uint8)}, device=CPU)
    assert draw() == expected
