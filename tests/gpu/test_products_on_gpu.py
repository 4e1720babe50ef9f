"""Logits of a large vocabulary, their gradients and the sum of the weight's over chunks, against float64 on the GPU."""

import pytest
import torch

from fire_megatron.losses import products
from fire_megatron.losses.vocab_parallel import score_log_prob_and_entropy

pytestmark = pytest.mark.gpu

TOKENS, ROWS, HIDDEN = 192, 151936, 2560
"""Of Qwen3-4B."""
CHUNKS = 3


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16])
def factors(request):
    """Hidden states and a weight of which logits are up to 16 to 32."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((TOKENS, HIDDEN), (ROWS, HIDDEN))
    return [
        torch.randn(s, device="cuda", generator=generator).mul(5**0.5 / HIDDEN**0.25).to(request.param) for s in shapes
    ]


def exact_logits(hidden, weight):
    """[C, V] float64, a part of the weight at a time."""
    return torch.cat([hidden.double() @ rows.double().t() for rows in weight.split(2**14)], -1)


def test_log_probs(factors):
    hidden, weight = factors
    logits, exact = products.project(hidden, weight), exact_logits(hidden, weight)
    target = torch.arange(TOKENS, device="cuda")
    log_p = exact.log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
    ours, _ = score_log_prob_and_entropy(logits, target, group=None, vocab_start=0)
    assert logits.dtype == torch.float32 and 16 < exact.abs().max() < 40
    # Tensor cores sum 2,560 products of up to 22 in float32; rounded to bfloat16, logits would be off by 0.06.
    assert (logits - exact).abs().max() < 5e-4 and (ours - log_p).abs().max() < 5e-4


def test_gradients(factors):
    hidden, weight = factors
    generator = torch.Generator("cuda").manual_seed(1)
    total, exact = torch.zeros(ROWS, HIDDEN, device="cuda"), torch.zeros(2**10, HIDDEN, device="cuda").double()
    for part in range(CHUNKS):
        grad = torch.randn(TOKENS, ROWS, device="cuda", generator=generator).mul_(2.0 ** -(4 * part))
        factor, of_hidden = products.as_factor(grad, weight), torch.empty_like(hidden)
        assert factor.dtype == hidden.dtype
        products.hidden_gradient(factor, weight, of_hidden)
        reference = sum(
            f.double() @ w.double() for f, w in zip(factor.split(2**14, -1), weight.split(2**14), strict=True)
        )
        error = (of_hidden.double() - reference).abs().max() / reference.abs().max()
        assert error < 2 * torch.finfo(hidden.dtype).eps
        products.add_weight_gradient(factor, hidden, total)
        exact += factor[:, : len(exact)].double().t() @ hidden.double()
    assert ((total[: len(exact)] - exact).abs().max() / exact.abs().max()).item() < 1e-5
