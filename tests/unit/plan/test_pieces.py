"""A few layers tell the rest only where all of them are alike."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fire_megatron.plan.pieces import MANY_LAYERS, of_all_layers
from fire_megatron.plan.trace import Trace

COUNT = MANY_LAYERS + 4


def block(windows):
    """Layers with these sliding windows."""
    layers = [
        SimpleNamespace(mlp=0, self_attention=SimpleNamespace(core_attention=SimpleNamespace(window=window)))
        for window in windows
    ]
    config = SimpleNamespace(recompute_granularity=None)
    return SimpleNamespace(decoder=SimpleNamespace(layers=layers), config=config)


@pytest.mark.parametrize(
    ("windows", "most"),
    [([None] * COUNT, 3), ([7] * COUNT, 3), ([None, 7] * (COUNT // 2), COUNT), ([7] * (COUNT - 1) + [None], COUNT)],
)
def test_layers_with_other_windows_are_all_run(windows, most):
    model, seen = block(windows), []

    def run():
        layers = model.decoder.layers
        seen.append(len(layers))
        return Trace(flops=sum(layer.self_attention.core_attention.window or 100 for layer in layers))

    total, _ = of_all_layers(model, run, run)
    assert total.flops == sum(window or 100 for window in windows) and max(seen) == most
    assert len(model.decoder.layers) == COUNT
