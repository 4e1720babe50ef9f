"""What log-probability and entropy have of their own, on one process. What all losses of a token have in common is in
test_token_losses.py."""

import pytest
import torch

from fire_megatron.losses.vocab_parallel import log_prob_and_entropy, score_log_prob_and_entropy


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


def test_target_mistakes_are_visible():
    logits, _, *_ = case(3, 8)
    logits[:, 7] = float("-inf")
    log_prob, _ = local(logits, torch.tensor([8, -1, 7]))
    assert log_prob[:2].isnan().all() and log_prob[2] == float("-inf")


def test_scoring_equals_the_differentiable_entry_and_keeps_no_graph():
    logits, target, *_ = case(33, 130)
    expected = local(logits, target)
    scored = score_log_prob_and_entropy(logits.requires_grad_(), target, group=None, vocab_start=0)
    for value, reference in zip(scored, expected, strict=True):
        assert torch.equal(value, reference) and not value.requires_grad
