"""The teacher's top-k and the divergence on it, on one process, against dense float64."""

import itertools

import dense
import pytest
import torch
from dense import KINDS, overwritten, value_and_gradient

from fire_megatron.losses.divergences import build_divergence
from fire_megatron.losses.topk import TopK, top_k, topk_divergence
from fire_megatron.losses.vocab_divergence import divergence

SHAPES = [(1, 1), (1, 7), (5, 64), (33, 130)]
NOTHING = -1e30
EXACT = {torch.float32: dict(rtol=1e-5, atol=1e-6), torch.float64: dict(rtol=1e-12, atol=1e-13)}
every_kind = pytest.mark.parametrize("kind", KINDS)


def local(kind, teacher, **options):
    built = build_divergence(kind, **KINDS[kind])
    return lambda logits: topk_divergence(logits, teacher, kind=built, group=None, vocab_start=0, **options)


def full(kind, teacher_logits, **options):
    built = build_divergence(kind, **KINDS[kind])
    return lambda logits: divergence(logits, teacher_logits, kind=built, group=None, **options)


def reference(kind, teacher, temperature=1.0):
    """Of the same buckets, summed densely; with the teacher's log-probabilities as given."""
    log_t = torch.cat((teacher.log_prob_TK, teacher.tail_log_prob_T[:, None]), -1).double()

    def function(logits):
        log_s = dense.buckets(dense.log_softmax(logits, temperature), teacher.ids_TK)
        return dense.divergence(kind, log_s, log_t, **KINDS[kind])

    return function


def likeliest(logits, k, **options):
    return top_k(logits, k, group=None, vocab_start=0, **options)


def in_order(logits, k):
    """Ids by falling logit, the smaller id first among equals."""
    return logits.float().sort(dim=-1, descending=True, stable=True).indices[:, :k]


def draw(tokens, vocabulary, dtype=torch.float32, scale=3.0):
    """Logits of the student and the teacher, and output gradients."""
    generator = torch.Generator().manual_seed(tokens * 1000 + vocabulary)
    logits = torch.randn(2, tokens, vocabulary, generator=generator) * scale
    return (*logits.to(dtype).unbind(), torch.randn(tokens, generator=generator))


def sizes(vocabulary):
    return sorted({1, min(7, vocabulary), vocabulary // 2 or 1, vocabulary})


def same(ours, expected, dtype=torch.float32):
    for value, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(value.double(), other.double(), **EXACT[dtype])


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
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_dense_float64(kind, shape, dtype):
    student, teacher, grad = draw(*shape)
    student = student.to(dtype)
    for k in sizes(shape[1]):
        found = likeliest(teacher, k)
        expected = value_and_gradient(reference(kind, found), student.double(), grad)
        for block in (None, 1, 4):
            ours = value_and_gradient(local(kind, found, block_tokens=block), student, grad)
            assert [result.dtype for result in ours] == [dtype] * 2
            same(ours, expected, dtype)


@every_kind
@pytest.mark.parametrize("temperatures", [(0.5, 1.0), (1.0, 2.5), (3.0, 0.7)])
def test_each_side_has_its_temperature(kind, temperatures):
    student, teacher, grad = draw(9, 64)
    found = likeliest(teacher, 7, temperature=temperatures[1])
    log_t = dense.buckets(dense.log_softmax(teacher, temperatures[1]), found.ids_TK)
    exact = TopK(found.ids_TK, log_t[:, :-1], log_t[:, -1])
    expected = value_and_gradient(reference(kind, exact, temperatures[0]), student.double(), grad)
    same(value_and_gradient(local(kind, found, temperature=temperatures[0]), student, grad), expected)


@every_kind
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_whole_vocabulary_listed_is_the_full_divergence(kind, temperature):
    student, teacher, grad = draw(33, 130)
    options = {"temperature": temperature}
    expected = value_and_gradient(full(kind, teacher, **options), student, grad)
    ours = value_and_gradient(local(kind, likeliest(teacher, 130), **options), student, grad)
    for value, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_above_the_full_divergence_and_growing_with_k(kind, dtype):
    student, teacher, _ = draw(33, 130, dtype)
    values = [local(kind, likeliest(teacher, k))(student) for k in (1, 2, 5, 20, 60, 129, 130)]
    values.append(full(kind, teacher)(student))
    assert (values[0] > 0).any()
    for coarse, fine in itertools.pairwise(values):
        assert (coarse <= fine + 2e-6).all()


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_distributions_have_no_divergence(kind, dtype):
    student, _, grad = draw(33, 1000, dtype)
    for k in (1, 7, 1000):
        value, gradient = value_and_gradient(local(kind, likeliest(student, k)), student, grad)
        assert (value >= 0).all() and (value < 1e-6).all()
        assert (gradient.abs() < 2e-6).all()


@every_kind
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(kind, dtype, reuse):
    student, teacher, grad = draw(9, 1000, dtype)
    found, run = likeliest(teacher, 20), overwritten if reuse else value_and_gradient
    value, gradient = run(local(kind, found, reuse_logits=reuse), student, grad)
    expected = value_and_gradient(reference(kind, found), student.double(), grad)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(value.double(), expected[0], **EXACT[torch.float32])
    # Rounded once, as the gradient is written in backward either way.
    tolerance = dict(rtol=torch.finfo(dtype).eps * 0.51, atol=2e-8 + (2.0**-24 if dtype is torch.float16 else 0))
    torch.testing.assert_close(gradient.double(), expected[1], **tolerance)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_extreme_logits(kind, dtype):
    rows = torch.tensor([[1e4, -1e4, 0.0, 1e4], [-1e4, -1e4, -1e4, -1e4], [1e4, 9984.0, -1e4, 0.0], [0.0, 1, 2, 3]])
    student, teacher = (x.reshape(-1, 4) for x in torch.broadcast_tensors(rows[:, None], rows[None]))
    student, grad, rounding = student.to(dtype), torch.ones(16), max(1e-5, torch.finfo(dtype).eps)
    for k in (1, 2, 3, 4):
        found = likeliest(teacher, k)
        value, gradient = value_and_gradient(local(kind, found), student, grad)
        expected = value_and_gradient(reference(kind, found), student.double(), grad)
        assert value.isfinite().all() and gradient.isfinite().all()
        torch.testing.assert_close(value.double(), expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient.double(), expected[1], rtol=rounding, atol=1e-6)


# The tail's probability is a subnormal number or 0, and what the teacher gives it is not.
@every_kind
@pytest.mark.parametrize("gap", [88, 95, 102, 200])
def test_the_gradient_is_right_where_the_students_tail_underflows(kind, gap):
    student, teacher, grad = draw(5, 64)
    student[:, 3] += gap
    ids = torch.full((5, 1), 3)
    log_t = dense.buckets(dense.log_softmax(teacher), ids).float()
    found = TopK(ids, log_t[:, :1], log_t[:, 1])
    ours = value_and_gradient(local(kind, found), student, grad)
    same(ours, value_and_gradient(reference(kind, found), student.double(), grad))


@every_kind
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_padded_columns_contribute_exactly_nothing(kind, temperature):
    student, teacher, grad = draw(9, 64)
    student[:, 50:] = teacher[:, 50:] = -torch.inf
    for k in (1, 7, 50, 60):
        found = likeliest(teacher, k)
        value, gradient = value_and_gradient(local(kind, found, temperature=temperature), student, grad)
        real = likeliest(teacher[:, :50], min(k, 50))
        expected = value_and_gradient(reference(kind, real, temperature), student[:, :50].double(), grad)
        torch.testing.assert_close(value.double(), expected[0], **EXACT[torch.float32])
        torch.testing.assert_close(gradient[:, :50].double(), expected[1], rtol=1e-5, atol=1e-5)
        assert torch.equal(gradient[:, 50:], torch.zeros(9, 14))


@every_kind
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_tokens_are_exactly_zero_whatever_they_hold(kind, dtype, reuse):
    student, teacher, grad = draw(9, 50, dtype)
    run = overwritten if reuse else value_and_gradient
    plain = run(local(kind, likeliest(teacher, 7), reuse_logits=reuse), student, grad)
    mask = torch.tensor([True, False, True, False, False, False, True, True, False])
    student[1], student[3, 5], student[4] = torch.nan, torch.inf, -torch.inf
    teacher[5], teacher[8, 0] = torch.nan, torch.inf
    grad[1] = torch.nan
    found = likeliest(teacher, 7)
    assert ((found.ids_TK >= 0) & (found.ids_TK < 50)).all()
    ours = run(local(kind, found, mask_T=mask, reuse_logits=reuse, block_tokens=4), student, grad)
    for value, expected in zip(ours, plain, strict=True):
        assert torch.equal(value[~mask], torch.zeros_like(value[~mask]))
        assert torch.equal(value[mask], expected[mask]) and expected[mask].any()


@every_kind
@pytest.mark.parametrize("reuse", [False, True])
def test_no_tokens(kind, reuse):
    logits = torch.randn(0, 10, requires_grad=True)
    value = local(kind, likeliest(torch.randn(0, 10), 3), reuse_logits=reuse)(logits)
    assert value.shape == (0,)
    value.sum().backward()
    assert logits.grad.shape == (0, 10)


@every_kind
@pytest.mark.parametrize("k", [1, 4, 9])
def test_gradcheck_in_float64(kind, k):
    student, teacher, _ = draw(4, 9)
    options = {"temperature": 0.7, "mask_T": torch.tensor([True, False, True, True]), "block_tokens": 3}
    found = likeliest(teacher, k)
    assert torch.autograd.gradcheck(local(kind, found, **options), student.double().requires_grad_())


@every_kind
@pytest.mark.parametrize("block", [None, 1, 4])
def test_reused_logits_hold_the_same_gradient(kind, block):
    student, teacher, grad = draw(33, 130)
    options = {"mask_T": torch.arange(33) % 3 > 0, "temperature": 0.7, "block_tokens": block}
    plain = value_and_gradient(local(kind, likeliest(teacher, 7), **options), student, grad)
    ours = overwritten(local(kind, likeliest(teacher, 7), reuse_logits=True, **options), student, grad)
    for value, expected in zip(ours, plain, strict=True):
        assert torch.equal(value, expected)


@every_kind
def test_logits_and_buckets_are_all_that_is_saved(kind):
    student, teacher, grad = draw(33, 130)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        value_and_gradient(local(kind, likeliest(teacher, 7)), student, grad)
    # Seven ids and eight buckets, peak and log-sum.
    assert sum(tensor.numel() for tensor in saved) <= student.numel() + (7 + 8 + 2) * 33


@every_kind
def test_only_a_block_exists_in_full_precision(kind):
    student, teacher, grad = draw(40, 130, torch.bfloat16)
    with dense.Allocations() as search:
        found = likeliest(teacher, 7, block_tokens=4)
    function, leaf = local(kind, found, block_tokens=4), student.requires_grad_()
    with dense.Allocations() as forward:
        value = function(leaf)
    with dense.Allocations() as backward:
        torch.autograd.grad(value, leaf, grad.float())
    assert max(search.sizes) == max(forward.sizes) == 4 * 130
    assert sorted(backward.sizes)[-2:] == [4 * 130, 40 * 130]  # the gradient itself


@every_kind
def test_non_contiguous_logits_and_expanded_gradients(kind):
    student, teacher, _ = draw(33, 130)
    strided, grad = [x.t().contiguous().t() for x in (student, teacher)], torch.ones(()).expand(33)
    assert torch.equal(likeliest(strided[1], 7).ids_TK, likeliest(teacher, 7).ids_TK)
    expected = value_and_gradient(local(kind, likeliest(teacher, 7)), student, grad)
    same(value_and_gradient(local(kind, likeliest(strided[1], 7)), strided[0], grad), expected)


def test_an_id_that_is_nowhere_is_visible():
    teacher = TopK(torch.tensor([[1, 2], [1, 9]]), torch.full((2, 2), -2.0), torch.full((2,), -0.3))
    kind = build_divergence("reverse_kl")
    value = topk_divergence(torch.randn(2, 8), teacher, kind=kind, group=None, vocab_start=0)
    assert value[0].isfinite() and value[1].isnan()
