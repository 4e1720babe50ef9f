"""Models and prompts that all tests of the command line share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import make_inputs


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What :func:`make_inputs` makes, the student of one layer; not to be changed."""
    return make_inputs(tmp_path_factory.mktemp("tiny"), num_hidden_layers=1)
