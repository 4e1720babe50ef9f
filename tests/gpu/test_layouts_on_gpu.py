"""NCCL: every kind of parallelism on two GPUs gives what one GPU gives."""

from __future__ import annotations

import importlib.util

import pytest
from gpu_runs import assert_close, need_gpus, run
from tiny_run import make_inputs, read_metrics

LAYOUTS = {"tensor": {"tensor": 2}, "pipeline": {"pipeline": 2}, "context": {"context": 2}, "data": {}}
SPECS = ["local", pytest.param("te", marks=pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
))]  # fmt: skip
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("nccl"), head_dim=32)


@pytest.mark.parametrize("layer_spec", SPECS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_gpus_equal_one(inputs, layer_spec, layout):
    need_gpus(2)
    one = inputs / f"one-{layer_spec}"
    if not one.exists():
        run(inputs, one.name, device="cuda", layer_spec=layer_spec)
    two = run(inputs, f"{layout}-{layer_spec}", ranks=2, device="cuda", layer_spec=layer_spec, parallel=LAYOUTS[layout])
    assert_close(two[0], read_metrics(one)[0])


def test_roles_on_gpus_of_their_own(inputs):
    """The student on one GPU, its teachers on the other: rows and log-probabilities travel between them."""
    need_gpus(2)
    spans = {"student__ranks": "0", "teachers__math__ranks": "1", "teachers__code__ranks": "1"}
    one = run(inputs, "together", device="cuda")
    two = run(inputs, "apart", ranks=2, device="cuda", **spans)
    assert_close(two[0], one[0])
