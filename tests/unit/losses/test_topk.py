"""The teacher's top-k, and what the divergence on it has of its own, on one process. What all losses of a token have in
common is in test_token_losses.py."""

import itertools

import dense
import pytest
import torch
from dense import KINDS
from token_losses import Loss, draw, run, same

from fire_megatron.losses.divergences import build_divergence
from fire_megatron.losses.topk import TopK, top_k, topk_divergence

SHAPES = [(1, 1), (1, 7), (5, 64), (33, 130)]
NOTHING = -1e30
every_kind = pytest.mark.parametrize("kind", KINDS)


def likeliest(logits, k, **options):
    return top_k(logits, k, group=None, vocab_start=0, **options)


def in_order(logits, k):
    """Ids by falling logit, the smaller id first among equals."""
    return logits.float().sort(dim=-1, descending=True, stable=True).indices[:, :k]


def sizes(vocabulary):
    return sorted({1, min(7, vocabulary), vocabulary // 2 or 1, vocabulary})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_top_k_equals_a_dense_sort(shape, dtype, temperature):
    logits, before = (x := draw(*shape, dtype)[0]), x.clone()
    log_p = dense.log_softmax(logits, temperature)
    for k in sizes(shape[1]):
        expected = dense.buckets(log_p, in_order(logits, k)).clamp_min(NOTHING)
        for block in (None, 1, 4):
            found = likeliest(logits, k, temperature=temperature, block_tokens=block)
            assert torch.equal(found.ids_TK, in_order(logits, k))
            assert found.log_prob_TK.dtype == found.tail_log_prob_T.dtype == torch.float32
            same((found.log_prob_TK, found.tail_log_prob_T), (expected[:, :-1], expected[:, -1]))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_among_equal_logits_the_smaller_id_comes_first(dtype):
    logits = draw(9, 1000, dtype)[0].mul_(2).round_().div_(4)
    logits[0] = 0
    logits[1] = torch.tensor([0.0, -0.0]).repeat(500)
    logits[2] = torch.tensor([-0.0, 0.0, -1.0, 1.0]).repeat(250)
    assert logits.unique().numel() < 50
    for k in (1, 7, 400, 1000):
        assert torch.equal(likeliest(logits, k).ids_TK, in_order(logits, k))


def test_a_tail_far_below_float32_keeps_its_logarithm():
    logits = torch.full((2, 100), -1e4)
    logits[0, 3] = logits[1, 99] = 1e4
    found = likeliest(logits, 1)
    assert found.ids_TK.tolist() == [[3], [99]] and torch.equal(found.log_prob_TK, torch.zeros(2, 1))
    torch.testing.assert_close(found.tail_log_prob_T, torch.full((2,), -2e4 + torch.tensor(99.0).log().item()))
    # The tail's probability is down to e^-197 of the whole.
    steep = -torch.arange(100.0)[None] * 2
    tails = [likeliest(steep, k).tail_log_prob_T.item() for k in (10, 50, 99)]
    expected = [dense.buckets(dense.log_softmax(steep), torch.arange(k)[None])[0, -1].item() for k in (10, 50, 99)]
    assert tails == pytest.approx(expected, rel=1e-6)


def test_top_k_gives_padded_columns_no_mass():
    logits = draw(5, 20)[0]
    logits[:, 12:] = -torch.inf
    log_p = dense.log_softmax(logits[:, :12])
    for k in (1, 5, 12):
        found, expected = likeliest(logits, k), dense.buckets(log_p, in_order(logits, k)).clamp_min(NOTHING)
        assert torch.equal(found.ids_TK, in_order(logits, k))
        same((found.log_prob_TK, found.tail_log_prob_T), (expected[:, :-1], expected[:, -1]))
    beyond = likeliest(logits, 15)
    assert torch.equal(beyond.ids_TK[:, 12:], torch.tensor([12, 13, 14]).expand(5, 3))
    assert (beyond.log_prob_TK[:, 12:] <= NOTHING).all() and (beyond.tail_log_prob_T <= NOTHING).all()


def test_top_k_of_no_tokens():
    found = likeliest(torch.randn(0, 10), 3)
    assert found.ids_TK.shape == found.log_prob_TK.shape == (0, 3) and found.tail_log_prob_T.shape == (0,)


def test_a_slice_of_top_k_is_that_of_the_tokens():
    logits = draw(33, 130)[0]
    part, expected = likeliest(logits, 7)[5:9], likeliest(logits[5:9], 7)
    for name in ("ids_TK", "log_prob_TK", "tail_log_prob_T"):
        assert torch.equal(getattr(part, name), getattr(expected, name))


@every_kind
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_whole_vocabulary_listed_is_the_full_divergence(kind, temperature):
    student, teacher, grad = draw(33, 130)
    options = {"temperatures": (temperature, temperature)}
    expected = run(Loss(kind).ours(teacher, **options), student, grad)
    ours = run(Loss(kind, 130).ours(teacher, **options), student, grad)
    for value, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_above_the_full_divergence_and_growing_with_k(kind, dtype):
    student, teacher, _ = draw(33, 130, dtype)
    values = [Loss(kind, k).ours(teacher)(student) for k in (1, 2, 5, 20, 60, 129, 130)]
    values.append(Loss(kind).ours(teacher)(student))
    assert (values[0] > 0).any()
    for coarse, fine in itertools.pairwise(values):
        assert (coarse <= fine * (1 + 1e-6) + 2e-6).all()


# The tail's probability is a subnormal number or 0, and what the teacher gives it is not.
@every_kind
@pytest.mark.parametrize("gap", [88, 95, 102, 200])
def test_the_gradient_is_right_where_the_students_tail_underflows(kind, gap):
    student, teacher, grad = draw(5, 64)
    student[:, 3] += gap
    ids = torch.full((5, 1), 3)
    log_t = dense.buckets(dense.log_softmax(teacher), ids).float()
    found = TopK(ids, log_t[:, :1], log_t[:, 1])
    loss = Loss(kind, 1)
    ours = run(loss.ours(teacher, found=found), student, grad)
    same(ours, run(loss.dense(teacher, found=found), student.double(), grad))


def test_an_id_that_is_nowhere_is_visible():
    teacher = TopK(torch.tensor([[1, 2], [1, 9]]), torch.full((2, 2), -2.0), torch.full((2,), -0.3))
    kind = build_divergence("reverse_kl")
    value = topk_divergence(torch.randn(2, 8), teacher, kind=kind, group=None, vocab_start=0)
    assert value[0].isfinite() and value[1].isnan()
