"""What a trace sees of tensors with memory, and what it knows of those without."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fire_megatron.plan.trace import Trace, Tracing, storage_bytes


def test_memory_is_counted_while_it_is_held():
    outside = torch.zeros(1000)
    with Tracing() as tracing:
        kept = torch.zeros(100)
        outside.view(10, 100).add_(1)  # neither a view nor what is written in place is new memory
        dropped = outside + 1
        del dropped
        held = kept.view(10, 10)
        del kept
        assert tracing.trace.live == 400
        del held
    assert tracing.trace.live == 0
    assert tracing.trace.peak == 400 + 4000


def test_what_autograd_saves_is_held():
    weight = torch.randn(64, 32, requires_grad=True)
    with Tracing() as tracing:
        out = (torch.randn(16, 64) @ weight).sigmoid()
        loss = out.sum()
        del out
        assert tracing.trace.live >= 4 * (16 * 64 + 16 * 32)  # the input of the product, the output of the sigmoid
        loss.backward()
        del loss
    assert tracing.trace.live == weight.grad.nbytes


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operations_of_products_and_attention(device):
    a, b = torch.zeros(8, 16, device=device, requires_grad=True), torch.zeros(16, 32, device=device)
    with Tracing() as tracing:
        (a @ b).sum().backward()
    assert tracing.trace.flops == 2 * 2 * 8 * 16 * 32
    query = torch.zeros(1, 4, 128, 64, device=device, requires_grad=True)
    with Tracing() as tracing:
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        fused(query, query, query, 0.0, True)[0].sum().backward()
    forward = 4 * 4 * 128 * 128 * 64 // 2
    assert tracing.trace.flops == forward + forward * 5 // 2


def test_small_values_are_known_on_meta():
    with Tracing():
        counts = torch.tensor([3, 1, 2]).to("meta")
        assert counts.tolist() == [3, 1, 2]
        assert counts.sum().item() == 6
        assert (counts * 2)[1:].cpu().tolist() == [2, 4]
        counts[0] = 7
        counts.add_(1)
        assert counts.max().item() == 8
        here = torch.zeros(3, dtype=torch.int64)
        here.copy_(counts)
        assert here.tolist() == [8, 2, 3]


def test_what_is_not_known_reads_as_zero():
    with Tracing():
        large = torch.ones(100_000).to("meta")
        assert large.sum().item() == 0.0
        made = torch.empty(4, device="meta")
        assert made.tolist() == [0.0] * 4
        known = torch.tensor([1.0, 2.0]).to("meta")
        known.add_(made[:2])
        assert known.tolist() == [0.0, 0.0], "no longer known"


def test_traces_add_up():
    with Tracing() as tracing:
        F.linear(torch.zeros(2, 3), torch.zeros(4, 3))
    total = Trace.total((5, tracing.trace), (-2, tracing.trace))
    assert total.flops == 3 * tracing.trace.flops > 0
    assert total.operators == 3 * tracing.trace.operators
    assert total.peak == tracing.trace.peak


def test_storages_count_once():
    base = torch.zeros(10)
    assert storage_bytes([base, base[2:], base.view(2, 5), torch.zeros(1)]) == 44
