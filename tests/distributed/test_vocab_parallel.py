"""log_prob_and_entropy with the vocabulary sharded over ranks equals the unsharded one, forward and backward."""

import pytest
import torch
import torch.distributed as dist

from fire_megatron.losses.vocab_parallel import log_prob_and_entropy, score_log_prob_and_entropy

VOCABULARY = 96


def case(tokens, dtype, padding=0, scale=3.0):
    """The same on every rank: logits with padding at the end, targets within the real vocabulary, output gradients."""
    generator = torch.Generator().manual_seed(tokens + padding)
    logits = torch.randn(tokens, VOCABULARY, generator=generator).mul_(scale).to(dtype)
    logits[:, VOCABULARY - padding :] = float("-inf")
    target = torch.randint(VOCABULARY - padding, (tokens,), generator=generator)
    return logits, target, torch.randn(tokens, generator=generator), torch.randn(tokens, generator=generator)


def run(logits, target, grad_log_prob, grad_entropy, **options):
    logits = logits.detach().clone().requires_grad_()
    before = logits.detach().clone()
    log_prob, entropy = log_prob_and_entropy(logits, target, **options)
    torch.autograd.backward([log_prob, entropy], [grad_log_prob.to(log_prob.dtype), grad_entropy.to(entropy.dtype)])
    assert torch.equal(logits.detach(), before)
    return log_prob.detach(), entropy.detach(), logits.grad


def shard(logits, group):
    width = VOCABULARY // group.size()
    start = group.rank() * width
    return logits[:, start : start + width], start


def same_on_all_ranks(values, group):
    gathered = [torch.empty_like(values) for _ in range(group.size())]
    dist.all_gather(gathered, values, group=group)
    return all(torch.equal(value, values) for value in gathered)


# 90 of 96 columns padded leave whole shards without a real column at 2 and at 4 ranks.
@pytest.mark.parametrize("padding", [0, 5, 90])
@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 4])
def test_equals_unsharded(subgroup, world_size, size, dtype, chunk, padding):
    if world_size % size:
        pytest.skip(f"needs a multiple of {size} ranks")
    group = subgroup(size)
    logits, target, *grads = case(33, dtype, padding)
    log_prob, entropy, gradient = run(logits, target, *grads, group=None, vocab_start=0)
    part, start = shard(logits, group)
    ours = run(part, target, *grads, group=group, vocab_start=start, block_tokens=chunk)
    exact = 1e-12 if dtype is torch.float64 else 2e-6
    torch.testing.assert_close(ours[0], log_prob, rtol=exact, atol=exact)
    torch.testing.assert_close(ours[1], entropy, rtol=exact, atol=exact)
    rounding = torch.finfo(dtype).eps if dtype is torch.bfloat16 else exact
    torch.testing.assert_close(ours[2], shard(gradient, group)[0], rtol=rounding, atol=exact)
    assert ours[2].dtype == dtype and same_on_all_ranks(torch.stack(ours[:2]), group)


@pytest.mark.parametrize("padding", [0, 90])
def test_equals_dense_float64(subgroup, world_size, padding):
    group = subgroup(world_size)
    logits, target, *grads = case(33, torch.float32, padding)
    reference = logits[:, : VOCABULARY - padding].double().requires_grad_()
    log_p = torch.log_softmax(reference, -1)
    expected = log_p.gather(-1, target[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)
    torch.autograd.backward(expected, [grad.double() for grad in grads])
    gradient = torch.zeros(33, VOCABULARY, dtype=torch.float64)
    gradient[:, : VOCABULARY - padding] = reference.grad
    part, start = shard(logits, group)
    ours = run(part, target, *grads, group=group, vocab_start=start)
    for value, dense in zip(ours, (*expected, shard(gradient, group)[0]), strict=True):
        torch.testing.assert_close(value.double(), dense.detach(), rtol=1e-5, atol=2e-6)


def test_gradcheck_of_the_shard_in_float64(subgroup, world_size):
    # Perturbs the whole vocabulary on all ranks alike: each rank's shard of the dense logits.
    group = subgroup(world_size)
    logits, target, *grads = case(3, torch.float64, 90)
    weights = torch.stack(grads).double()

    def value(shift, row, column):
        moved = logits.clone()
        moved[row, column] += shift
        part, start = shard(moved, group)
        outputs = log_prob_and_entropy(part, target, group=group, vocab_start=start)
        return (weights * torch.stack(outputs)).sum()

    part, start = shard(logits, group)
    _, _, gradient = run(part, target, *grads, group=group, vocab_start=start)
    for row in range(3):
        for column in range(VOCABULARY - 90):
            numeric = (value(1e-6, row, column) - value(-1e-6, row, column)) / 2e-6
            if start <= column < start + part.shape[1]:
                torch.testing.assert_close(gradient[row, column - start], numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(subgroup, world_size, dtype):
    # Shard peaks are 2e4 apart, so that most shards' sums rescale to nothing.
    group = subgroup(world_size)
    logits, target, *grads = case(8, dtype, 10)
    logits[:4, : VOCABULARY // 2] = -1e4
    logits[2:6, 0] = 1e4
    whole = run(logits, target, *grads, group=None, vocab_start=0)
    part, start = shard(logits, group)
    ours = run(part, target, *grads, group=group, vocab_start=start)
    expected = *whole[:2], shard(whole[2], group)[0]
    for value, reference in zip(ours, expected, strict=True):
        assert value.isfinite().all()
        torch.testing.assert_close(value, reference, rtol=2e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)


def count_all_reduces(monkeypatch):
    calls = []
    real = dist.all_reduce

    def counted(*args, **kwargs):
        calls.append(kwargs.get("op"))
        return real(*args, **kwargs)

    monkeypatch.setattr(dist, "all_reduce", counted)
    return calls


@pytest.mark.parametrize("tokens", [0, 33])
@pytest.mark.parametrize("with_entropy", [True, False])
def test_two_all_reduces_forward_and_none_backward(subgroup, world_size, monkeypatch, tokens, with_entropy):
    group = subgroup(world_size)
    logits, target, *_ = case(tokens, torch.float32)
    part, start = shard(logits, group)
    part = part.clone().requires_grad_()
    calls = count_all_reduces(monkeypatch)
    log_prob, entropy = log_prob_and_entropy(
        part, target, group=group, vocab_start=start, with_entropy=with_entropy, block_tokens=4
    )
    assert calls == [dist.ReduceOp.MAX, dist.ReduceOp.SUM]
    (log_prob.sum() + (entropy.sum() if with_entropy else 0)).backward()
    assert len(calls) == 2 and part.grad.shape == part.shape


def test_scoring_equals_the_differentiable_entry(subgroup, world_size):
    group = subgroup(world_size)
    logits, target, *_ = case(33, torch.float32, 5)
    part, start = shard(logits, group)
    scored = score_log_prob_and_entropy(part, target, group=group, vocab_start=start)
    for value, expected in zip(scored, log_prob_and_entropy(part, target, group=group, vocab_start=start), strict=True):
        assert torch.equal(value, expected)


def test_a_target_that_no_shard_holds_is_visible_on_every_rank(subgroup, world_size):
    group = subgroup(world_size)
    logits, _, *_ = case(2, torch.float32)
    part, start = shard(logits, group)
    log_prob, _ = log_prob_and_entropy(part, torch.tensor([VOCABULARY, 3]), group=group, vocab_start=start)
    assert log_prob.isnan().tolist() == [True, False]
