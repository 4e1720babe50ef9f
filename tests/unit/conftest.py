"""A run of one rank, for the tests that build models or groups."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def grid() -> Iterator[object]:
    """The lone rank's grid; the run is left after the module."""
    from fire_megatron.parallel.grid import GridFactory, Layout
    from fire_megatron.platform import launch

    launch.start("cpu", threads=1)
    yield GridFactory(timeout=60).grid(Layout())
    launch.stop()
