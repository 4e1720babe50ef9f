"""What a plan for GPUs says of the loss, whose products a CPU cannot compute as they do."""

from __future__ import annotations

import pytest
import torch

from fire_megatron.losses import fused
from fire_megatron.losses.vocab_parallel import log_prob_and_entropy
from fire_megatron.plan.trace import Tracing
from fire_megatron.plan.world import simulated_rank

TOKENS, ROWS, HIDDEN = 96, 5000, 32


def token_loss(logits, part):
    target = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    value, _ = log_prob_and_entropy(logits, target, group=None, vocab_start=0, with_entropy=False, reuse_logits=True)
    return value.sum(), value[None]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("chunk", [TOKENS, TOKENS // 3])
def test_the_loss_in_bfloat16(kind, chunk):
    with simulated_rank(0, 1, kind):
        hidden, weight = (
            torch.empty(n, HIDDEN, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (TOKENS, ROWS)
        )
        with Tracing() as tracing:
            loss, _ = fused.chunked_linear_loss(hidden, weight, token_loss, chunk_tokens=chunk)
            held = tracing.trace.live
            loss.backward()
    assert loss.dtype == torch.float32 and hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert tracing.trace.flops == 3 * 2 * TOKENS * ROWS * HIDDEN
    # Between forward and backward: the weight's gradient in float32, that of the hidden states in bfloat16.
    gradients = 4 * ROWS * HIDDEN + 2 * TOKENS * HIDDEN
    assert gradients <= held < gradients + 100 * TOKENS
    # One chunk's logits, over which their gradient is written, and copies of a block.
    logits = 4 * chunk * ROWS
    assert gradients + logits < tracing.trace.peak < gradients + 2.2 * logits
