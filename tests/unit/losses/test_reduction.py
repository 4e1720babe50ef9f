"""The global token mean does not depend on how tokens are cut into micro-batches and ranks."""

import pytest
import torch

from fire_megatron.losses.reduction import global_token_count, token_mean
from fire_megatron.parallel.reducer import Reducer

CPU = torch.device("cpu")


class Ranks(Reducer):
    """Stands for a group whose other ranks hold these token counts."""

    def __init__(self, others):
        super().__init__()
        self.others = others

    def sum(self, values):
        return values + sum(self.others)


def test_count_over_ranks():
    assert global_token_count(0, reducer=Reducer(), device=CPU) == 0
    assert global_token_count(7, reducer=Ranks([5, 0, 30]), device=CPU) == 42


@pytest.mark.parametrize("cuts", [[64], [1, 63], [16] * 4, [0, 50, 0, 14], [1] * 64])
def test_summed_gradients_are_those_of_the_global_mean(cuts):
    # Means of micro-batch means would weigh tokens in short micro-batches more; sums over the global count do not.
    x = torch.randn(64, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad((x**2).mean(), x)
    parts = [token_mean((part**2), 64) for part in x.split(cuts)]
    (gradient,) = torch.autograd.grad(sum(parts), x)
    assert torch.equal(gradient, expected)
    torch.testing.assert_close(sum(parts), (x**2).mean())


def test_a_micro_batch_without_tokens_has_a_zero_loss_with_a_graph():
    x = torch.zeros(0, requires_grad=True)
    loss = token_mean(x, 10)
    loss.backward()
    assert loss == 0 and x.grad.shape == (0,)


def test_an_update_without_tokens_is_refused():
    with pytest.raises(AssertionError):
        token_mean(torch.zeros(0), 0)
