"""log_prob_and_entropy on one process against dense float64, forward and backward."""

import pytest
import torch

from fire_megatron.losses.vocab_parallel import log_prob_and_entropy, score_log_prob_and_entropy

SHAPES = [(1, 1), (1, 7), (5, 64), (33, 130)]


def dense(logits, target):
    """Log-probability and entropy in float64 by autograd; ``-inf`` columns are cut away first."""
    log_p = torch.log_softmax(logits.double(), -1)
    entropy = -(log_p.exp() * log_p.clamp_min(-1e300)).sum(-1)
    return log_p.gather(-1, target[:, None]).squeeze(-1), entropy


def run(function, logits, target, grad_log_prob, grad_entropy):
    logits = logits.detach().clone().requires_grad_()
    log_prob, entropy = function(logits, target)
    torch.autograd.backward([log_prob, entropy], [grad_log_prob.to(log_prob.dtype), grad_entropy.to(entropy.dtype)])
    return log_prob.detach(), entropy.detach(), logits.grad


def local(logits, target, **options):
    return log_prob_and_entropy(logits, target, group=None, vocab_start=0, **options)


def case(tokens, vocabulary, dtype=torch.float32, scale=3.0):
    generator = torch.Generator().manual_seed(tokens * 1000 + vocabulary)
    logits = (torch.randn(tokens, vocabulary, generator=generator) * scale).to(dtype)
    target = torch.randint(vocabulary, (tokens,), generator=generator)
    return logits, target, torch.randn(tokens, generator=generator), torch.randn(tokens, generator=generator)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_float32_equals_dense_float64(shape, chunk):
    logits, target, *grads = case(*shape)
    ours = run(lambda x, y: local(x, y, block_tokens=chunk), logits, target, *grads)
    reference = run(dense, logits.double(), target, *grads)
    assert [value.dtype for value in ours] == [torch.float32] * 3
    for value, expected in zip(ours, reference, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_float32(dtype):
    logits, target, *grads = case(33, 4000, dtype)
    log_prob, entropy, gradient = run(local, logits, target, *grads)
    expected = run(dense, logits.double(), target, *grads)
    assert log_prob.dtype == entropy.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(log_prob.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=1e-5, atol=1e-5)
    # The gradient is computed in float32 and rounded once: half a unit in the last place, not more.
    torch.testing.assert_close(
        gradient.double(), expected[2], rtol=torch.finfo(dtype).eps * 0.51, atol=torch.finfo(dtype).tiny
    )


@pytest.mark.parametrize("outputs", ["both", "log_prob", "entropy", "no_entropy"])
def test_gradcheck_in_float64(outputs):
    logits, target, *_ = case(4, 9, torch.float64)

    def function(x):
        log_prob, entropy = local(x, target, with_entropy=outputs != "no_entropy", block_tokens=3)
        return {"both": (log_prob, entropy), "log_prob": log_prob, "entropy": entropy, "no_entropy": log_prob}[outputs]

    assert torch.autograd.gradcheck(function, logits.requires_grad_())


def test_without_entropy_the_second_result_is_none():
    logits, target, *_ = case(5, 64)
    log_prob, entropy = local(logits, target, with_entropy=False)
    assert entropy is None
    assert torch.equal(log_prob, local(logits, target)[0])


@pytest.mark.parametrize("padding", [float("-inf"), torch.finfo(torch.float32).min, -1e30])
def test_padded_columns_contribute_exactly_nothing(padding):
    logits, target, *grads = case(9, 50)
    padded = torch.cat((logits, torch.full((9, 14), padding)), -1)
    plain, wide = run(local, logits, target, *grads), run(local, padded, target, *grads)
    for value, expected in zip(wide[:2], plain[:2], strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(wide[2][:, :50], plain[2], rtol=1e-5, atol=1e-6)
    assert torch.equal(wide[2][:, 50:], torch.zeros(9, 14))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_extreme_logits(dtype):
    values = torch.tensor([[1e4, -1e4, 0.0, 1e4], [-1e4, -1e4, -1e4, -1e4], [1e4, 9999.0, -1e4, 0.0]]).to(dtype)
    target = torch.tensor([0, 2, 1])
    grads = torch.ones(3), torch.ones(3)
    ours, reference = run(local, values, target, *grads), run(dense, values.double(), target, *grads)
    for value, expected in zip(ours, reference, strict=True):
        assert value.isfinite().all()
        torch.testing.assert_close(value.double(), expected, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)


def test_probabilities_stay_exact_under_a_large_offset():
    # peak + log-sum rounded to float32 would be off by 5e-4 at 1e4, and every gradient with it.
    logits, target, *grads = case(17, 64)
    logits = (logits * 64).round() / 64
    plain, lifted = run(local, logits, target, *grads), run(local, logits + 8192, target, *grads)
    for value, expected in zip(lifted, plain, strict=True):
        assert torch.equal(value, expected)


def test_one_hot_and_uniform_entropy():
    one_hot = torch.full((1, 100), -1e4)
    one_hot[0, 3] = 1e4
    log_prob, entropy = local(torch.cat((one_hot, torch.zeros(1, 100))), torch.tensor([3, 5]))
    assert entropy[0] == 0 and log_prob[0] == 0
    torch.testing.assert_close(entropy[1].exp(), torch.tensor(100.0))
    torch.testing.assert_close(log_prob[1].exp(), torch.tensor(0.01))


def test_no_tokens():
    logits = torch.randn(0, 10, requires_grad=True)
    log_prob, entropy = local(logits, torch.zeros(0, dtype=torch.int64))
    assert log_prob.shape == entropy.shape == (0,)
    (log_prob.sum() + entropy.sum()).backward()
    assert logits.grad.shape == (0, 10)


def test_target_mistakes_are_visible():
    logits, _, *_ = case(3, 8)
    logits[:, 7] = float("-inf")
    log_prob, _ = local(logits, torch.tensor([8, -1, 7]))
    assert log_prob[:2].isnan().all() and log_prob[2] == float("-inf")


def test_input_is_not_changed_and_only_it_is_saved():
    logits, target, *grads = case(33, 130)
    before = logits.clone()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run(local, logits, target, *grads)
    assert torch.equal(logits, before)
    assert sum(tensor.numel() for tensor in saved) <= logits.numel() + 4 * len(target)


@pytest.mark.parametrize("chunk", [None, 4])
def test_the_gradient_may_take_the_logits_memory(chunk):
    logits, target, *grads = case(33, 130)
    expected = run(local, logits, target, *grads)
    owned = logits.clone().requires_grad_()
    outputs = local(owned, target, block_tokens=chunk, reuse_logits=True)
    gradient = torch.autograd.grad(outputs, owned, grads)[0]
    torch.testing.assert_close(gradient, expected[2], rtol=1e-6, atol=1e-7)
    assert gradient.data_ptr() == owned.data_ptr()


def test_changing_the_logits_before_backward_is_caught():
    logits, target, *_ = case(5, 64)
    inner = logits.requires_grad_() * 1.0
    log_prob, _ = local(inner, target)
    inner.detach().add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_prob.sum().backward()


def test_non_contiguous_logits_and_expanded_gradients():
    logits, target, *_ = case(33, 130)
    grads = torch.ones(()).expand(33), torch.ones(()).expand(33)
    strided = logits.t().contiguous().t()
    for value, expected in zip(run(local, strided, target, *grads), run(local, logits, target, *grads), strict=True):
        torch.testing.assert_close(value, expected)


def test_scoring_equals_the_differentiable_entry_and_keeps_no_graph():
    logits, target, *_ = case(33, 130)
    expected = local(logits, target)
    scored = score_log_prob_and_entropy(logits.requires_grad_(), target, group=None, vocab_start=0)
    for value, reference in zip(scored, expected, strict=True):
        assert torch.equal(value, reference) and not value.requires_grad


def test_chunks_do_not_change_the_result():
    logits, target, *grads = case(33, 130)
    whole = run(lambda x, y: local(x, y, block_tokens=1000), logits, target, *grads)
    for chunk in (1, 2, 32, 33):
        parts = run(lambda x, y, c=chunk: local(x, y, block_tokens=c), logits, target, *grads)
        for value, expected in zip(parts, whole, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
