"""Hooks that modules of ``run.plugins`` register, against the rest of the recipe."""

from types import SimpleNamespace

import pytest

from fire_megatron.config.errors import RecipeError
from fire_megatron.config.loss import HookConfig, LossConfig
from fire_megatron.config.schema import OptimizerConfig
from fire_megatron.fire import hooks
from fire_megatron.train.inputs import load_plugins


class Whole:
    """A hook that is called for the step's whole batch."""

    def __call__(self, batch, selection, reducer):
        return selection


class ByMicroBatch(Whole):
    """A hook that takes its statistics over a micro-batch, whatever the recipe says."""

    scope = "microbatch"


@pytest.mark.parametrize("optimizer", [{"micro_batch_tokens": 64}, {"micro_batch_size": 4}])
@pytest.mark.parametrize("kind", [Whole, ByMicroBatch])
def test_micro_batches_by_tokens_have_no_rows_to_take_statistics_over(kind, optimizer, monkeypatch):
    monkeypatch.setitem(hooks._REGISTRY, "mine", kind)
    recipe = SimpleNamespace(
        run=SimpleNamespace(plugins=("sys",)),
        loss=LossConfig(hooks=(HookConfig("filter"), HookConfig("mine"))),
        optimizer=OptimizerConfig(**optimizer),
    )
    if kind is Whole or "micro_batch_size" in optimizer:
        assert isinstance(load_plugins(recipe)[1], kind)
        return
    with pytest.raises(RecipeError, match=r"loss.hooks.1 \(mine\): its scope is 'microbatch', .* is 64; set micro_ba"):
        load_plugins(recipe)
