"""Logits and their gradients of half-precision models against float64, as a CPU and as a GPU compute them."""

import pytest
import torch
from gpu_products import TORCHES, pretend_gpu

from fire_megatron.losses.products import add_weight_gradient, as_factor, hidden_gradient, project
from fire_megatron.losses.vocab_parallel import score_log_prob_and_entropy

TOKENS, ROWS, HIDDEN = 40, 1500, 64
HALF = [torch.bfloat16, torch.float16]


def draw(*shape, dtype=torch.bfloat16):
    """Factors of which logits are up to 16 to 32."""
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    return torch.randn(*shape, generator=generator).mul(7**0.5 / HIDDEN**0.25).to(dtype)


@pytest.fixture(params=[None, *TORCHES], ids=["cpu", "torch 2.13", "torch 2.9", "torch 2.7"])
def widened(request, monkeypatch):
    """The products that a pretended GPU has widened; None on the CPU that it is."""
    return None if request.param is None else pretend_gpu(monkeypatch, request.param)


@pytest.mark.parametrize("dtype", HALF)
def test_log_probs_carry_no_rounding_of_half_precision(dtype, widened):
    hidden, weight = draw(TOKENS, HIDDEN, dtype=dtype), draw(ROWS, HIDDEN, dtype=dtype)
    target = torch.arange(TOKENS)
    exact = hidden.double() @ weight.double().t()
    assert 16 < exact.abs().max() < 64
    log_p = exact.log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)

    def error(logits):
        return (score_log_prob_and_entropy(logits, target, group=None, vocab_start=0)[0] - log_p).abs().max()

    logits = project(hidden, weight)
    assert logits.dtype == torch.float32 and error(logits) < 1e-5
    assert error(exact.to(dtype)) > 3e-3  # what is not to happen
    into = torch.empty(TOKENS, 2 * ROWS)[:, :ROWS]
    assert project(hidden, weight, into) is into and torch.equal(into, logits)


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_are_those_of_a_rounded_gradient_of_logits(dtype, widened):
    hidden, weight = draw(TOKENS, HIDDEN, dtype=dtype), draw(ROWS, HIDDEN, dtype=dtype)
    grad = torch.randn(TOKENS, ROWS, generator=torch.Generator().manual_seed(1))
    factor = as_factor(grad, weight)
    on_gpu = bool(widened is not None)
    of_hidden, total = torch.empty_like(hidden), torch.ones(ROWS, HIDDEN)
    hidden_gradient(factor, weight, of_hidden)
    add_weight_gradient(factor, hidden, total)
    # Against the products of these very factors nothing but the last rounding is lost.
    exact = factor.double() @ weight.double()
    torch.testing.assert_close(of_hidden.double(), exact, rtol=torch.finfo(dtype).eps * 0.51, atol=1e-3)
    torch.testing.assert_close(total.double() - 1, factor.double().t() @ hidden.double(), rtol=0, atol=1e-4)
    if on_gpu and widened:
        assert factor.dtype == dtype
    torch.testing.assert_close(factor.double(), grad.double(), rtol=torch.finfo(factor.dtype).eps, atol=1e-6)


def test_which_product_widens(monkeypatch):
    seen = {}
    for release in TORCHES:
        widened = pretend_gpu(monkeypatch, release)
        hidden, weight = draw(TOKENS, HIDDEN), draw(ROWS, HIDDEN)
        factor = as_factor(project(hidden, weight), weight)
        hidden_gradient(factor, weight, torch.empty_like(hidden))
        add_weight_gradient(factor, hidden, torch.zeros(ROWS, HIDDEN))
        seen[release] = list(widened), factor.dtype
        monkeypatch.undo()
    half, full = torch.bfloat16, torch.float32
    assert seen == {(2, 13): (["mm", "addmm"], half), (2, 9): (["mm", "mm"], half), (2, 7): ([], full)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_weights_are_multiplied_as_they_are(dtype, widened):
    hidden, weight = draw(TOKENS, HIDDEN, dtype=dtype), draw(ROWS, HIDDEN, dtype=dtype)
    logits = project(hidden, weight)
    assert torch.equal(logits, hidden @ weight.t()) and as_factor(logits, weight) is logits
    of_hidden, total = torch.empty_like(hidden), torch.zeros_like(weight)
    hidden_gradient(logits, weight, of_hidden)
    add_weight_gradient(logits, hidden, total)
    assert torch.equal(of_hidden, logits @ weight)
    torch.testing.assert_close(total, logits.t() @ hidden)
    assert not widened
