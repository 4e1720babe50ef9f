"""Every exact divergence on one process against dense float64, forward and backward."""

import math

import dense
import pytest
import torch
from dense import KINDS, overwritten, value_and_gradient

from fire_megatron.losses.divergences import build_divergence
from fire_megatron.losses.vocab_divergence import divergence

SHAPES = [(1, 1), (1, 7), (5, 64), (33, 130)]
EXACT = {torch.float32: dict(rtol=1e-5, atol=1e-6), torch.float64: dict(rtol=1e-12, atol=1e-13)}
MIXTURES = ["distributions", "log_probs"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def local(kind, teachers, parameters=None, **options):
    built = build_divergence(kind, **(KINDS[kind] if parameters is None else parameters))
    return lambda logits: divergence(logits, teachers, kind=built, group=None, **options)


def reference(kind, log_t, temperature=1.0):
    return lambda logits: dense.divergence(kind, dense.log_softmax(logits, temperature), log_t, **KINDS[kind])


def draw(tokens, vocabulary, dtype=torch.float32, models=2, scale=3.0):
    """Logits of the student and its teachers, and output gradients."""
    generator = torch.Generator().manual_seed(tokens * 1000 + vocabulary)
    logits = torch.randn(models, tokens, vocabulary, generator=generator, dtype=torch.float64) * scale
    grad = torch.randn(tokens, generator=generator, dtype=torch.float64)
    return (*logits.to(dtype).unbind(), grad)


def draw_weights(tokens, teachers):
    """Different at every token; the first tokens have one teacher alone."""
    generator = torch.Generator().manual_seed(tokens + teachers)
    weights = torch.rand(tokens, teachers, generator=generator).add_(0.05)
    weights /= weights.sum(-1, keepdim=True)
    weights[:teachers] = torch.eye(teachers)
    return weights


def same(ours, expected, dtype=torch.float32):
    for value, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(value.double(), other.double(), **EXACT[dtype])


@every_kind
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_dense_float64(kind, shape, dtype):
    student, teacher, grad = draw(*shape, dtype)
    expected = value_and_gradient(reference(kind, dense.log_softmax(teacher)), student.double(), grad)
    for block in (None, 1, 4):
        ours = value_and_gradient(local(kind, teacher, block_tokens=block), student, grad)
        assert [result.dtype for result in ours] == [dtype] * 2
        same(ours, expected, dtype)


@every_kind
@pytest.mark.parametrize("temperatures", [(0.5, 1.0), (1.0, 2.5), (3.0, 0.7)])
def test_each_side_has_its_temperature(kind, temperatures):
    student, teacher, grad = draw(9, 64)
    log_t = dense.log_softmax(teacher, temperatures[1])
    expected = value_and_gradient(reference(kind, log_t, temperatures[0]), student.double(), grad)
    options = {"temperature": temperatures[0], "teacher_temperature": temperatures[1]}
    same(value_and_gradient(local(kind, teacher, **options), student, grad), expected)


@every_kind
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(kind, dtype, reuse):
    student, teacher, grad = draw(9, 1000, dtype)
    run = overwritten if reuse else value_and_gradient
    value, gradient = run(local(kind, teacher, reuse_logits=reuse), student, grad)
    expected = value_and_gradient(reference(kind, dense.log_softmax(teacher)), student.double(), grad)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(value.double(), expected[0], **EXACT[torch.float32])
    # Rounded once: half a unit in the last place, not more. Written over the logits it is rounded twice.
    roundings, smallest = 1 + reuse, 2.0**-24 if dtype is torch.float16 else 0.0
    tolerance = dict(rtol=torch.finfo(dtype).eps * 0.51 * roundings, atol=1e-8 + smallest * 2 * roundings)
    torch.testing.assert_close(gradient.double(), expected[1], **tolerance)


@every_kind
@pytest.mark.parametrize("dtypes", ["float32 bfloat16", "bfloat16 float32", "float32 float64", "bfloat16 float64"])
def test_the_teacher_may_have_another_dtype(kind, dtypes):
    student, teacher, grad = draw(5, 64)
    student, teacher = (x.to(getattr(torch, name)) for x, name in zip((student, teacher), dtypes.split(), strict=True))
    value, gradient = value_and_gradient(local(kind, teacher), student, grad)
    expected = value_and_gradient(reference(kind, dense.log_softmax(teacher)), student.double(), grad)
    assert value.dtype == torch.float32 and gradient.dtype == student.dtype
    torch.testing.assert_close(value.double(), expected[0], **EXACT[torch.float32])
    torch.testing.assert_close(
        gradient.double(), expected[1], rtol=max(1e-5, torch.finfo(student.dtype).eps), atol=1e-6
    )


@every_kind
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_extreme_logits(kind, dtype, reuse):
    rows = torch.tensor([[1e4, -1e4, 0.0, 1e4], [-1e4, -1e4, -1e4, -1e4], [1e4, 9984.0, -1e4, 0.0], [0.0, 1, 2, 3]])
    student, teacher = (x.reshape(-1, 4).to(dtype) for x in torch.broadcast_tensors(rows[:, None], rows[None]))
    run, grad = overwritten if reuse else value_and_gradient, torch.ones(16)
    ours = run(local(kind, teacher, reuse_logits=reuse), student, grad)
    expected = value_and_gradient(reference(kind, dense.log_softmax(teacher)), student.double(), grad)
    for value, other, rounding in zip(ours, expected, (1e-5, max(1e-5, torch.finfo(dtype).eps)), strict=True):
        assert value.isfinite().all()
        torch.testing.assert_close(value.double(), other, rtol=rounding, atol=1e-6)


@every_kind
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_columns_contribute_exactly_nothing(kind, temperature, dtype):
    *models, grad = draw(9, 50, dtype)
    wide = [torch.cat((x[:, :20], torch.full((9, 14), -torch.inf, dtype=dtype), x[:, 20:]), -1) for x in models]
    options = {"temperature": temperature, "teacher_temperature": temperature}
    value, gradient = value_and_gradient(local(kind, wide[1], **options), wide[0], grad)
    plain = value_and_gradient(local(kind, models[1], **options), models[0], grad)
    assert gradient.isfinite().all() and torch.equal(gradient[:, 20:34], torch.zeros(9, 14, dtype=dtype))
    kept = torch.cat((gradient[:, :20], gradient[:, 34:]), -1)
    torch.testing.assert_close(value, plain[0], rtol=1e-6, atol=1e-6)
    # Of the difference of two terms of up to 20.
    torch.testing.assert_close(kept, plain[1], rtol=max(1e-5, torch.finfo(dtype).eps), atol=1e-5)


@every_kind
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_tokens_are_exactly_zero_whatever_they_hold(kind, dtype, reuse):
    student, teacher, grad = draw(9, 50, dtype)
    run = overwritten if reuse else value_and_gradient
    plain = run(local(kind, teacher, reuse_logits=reuse), student, grad)
    mask = torch.tensor([True, False, True, False, False, False, True, True, False])
    student[1], student[3, 5], student[4] = torch.nan, torch.inf, -torch.inf
    teacher[5], teacher[8, 0] = torch.nan, torch.inf
    grad[1] = torch.nan
    ours = run(local(kind, teacher, mask_T=mask, reuse_logits=reuse, block_tokens=4), student, grad)
    for value, expected in zip(ours, plain, strict=True):
        assert torch.equal(value[~mask], torch.zeros_like(value[~mask]))
        assert torch.equal(value[mask], expected[mask]) and expected[mask].any()


@every_kind
@pytest.mark.parametrize("reuse", [False, True])
def test_no_tokens(kind, reuse):
    logits = torch.randn(0, 10, requires_grad=True)
    value = local(kind, torch.randn(0, 10), reuse_logits=reuse)(logits)
    assert value.shape == (0,)
    value.sum().backward()
    assert logits.grad.shape == (0, 10)


@every_kind
def test_gradcheck_in_float64(kind):
    student, teacher, _ = draw(4, 9, torch.float64)
    options = {"temperature": 0.7, "teacher_temperature": 1.5, "mask_T": torch.tensor([True, False, True, True])}
    assert torch.autograd.gradcheck(local(kind, teacher, block_tokens=3, **options), student.requires_grad_())


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_distributions_have_no_divergence(kind, dtype):
    student, _, grad = draw(33, 1000, dtype)
    value, gradient = value_and_gradient(local(kind, student.clone()), student, grad)
    assert (value >= 0).all() and (value < 1e-6).all()
    assert (gradient.abs() < 1e-6).all()
    nearly = student + 1e-4 * torch.randn(33, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert (local(kind, nearly)(student) >= 0).all()


@every_kind
@pytest.mark.parametrize("mixture", MIXTURES)
def test_logits_and_statistics_are_all_that_is_saved(kind, mixture):
    student, *teachers, grad = draw(33, 130, models=3)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        value_and_gradient(local(kind, teachers, weight_TM=draw_weights(33, 2), mixture=mixture), student, grad)
    # Two weights, peak and log-sum of three models, one sum.
    assert sum(tensor.numel() for tensor in saved) <= 3 * student.numel() + (2 + 2 * 3 + 1) * 33
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        local(kind, teachers, weight_TM=draw_weights(33, 2), mixture=mixture, reuse_logits=True)(
            student.requires_grad_()
        )
    assert sum(tensor.numel() for tensor in saved) == student.numel()


@every_kind
def test_only_a_block_exists_in_full_precision(kind):
    student, teacher, grad = draw(40, 130, torch.bfloat16)
    function, leaf = local(kind, teacher, block_tokens=4), student.requires_grad_()
    with dense.Allocations() as forward:
        value = function(leaf)
    with dense.Allocations() as backward:
        torch.autograd.grad(value, leaf, grad.float())
    assert max(forward.sizes) == 4 * 130
    assert sorted(backward.sizes)[-2:] == [4 * 130, 40 * 130]  # the gradient itself


@every_kind
@pytest.mark.parametrize("block", [None, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reused_logits_hold_the_same_gradient(kind, block, dtype):
    student, teacher, grad = draw(33, 130, dtype)
    before, mask = teacher.clone(), torch.arange(33) % 3 > 0
    options = {"mask_T": mask, "temperature": 0.7, "block_tokens": block}
    plain = value_and_gradient(local(kind, teacher, **options), student, grad)
    same(overwritten(local(kind, teacher, reuse_logits=True, **options), student, grad), plain, dtype)
    assert torch.equal(teacher, before)


def test_logits_are_reused_only_for_a_gradient_and_only_once():
    student, teacher, _ = draw(5, 64)
    before, function = student.clone(), local("reverse_kl", teacher, reuse_logits=True)
    function(student)
    with torch.no_grad():
        function(student.clone().requires_grad_())
    assert torch.equal(student, before)
    value = function(student.requires_grad_() * 1.0)
    value.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


def test_changing_the_logits_before_backward_is_caught():
    student, teacher, _ = draw(5, 64)
    inner = student.requires_grad_() * 1.0
    value = local("forward_kl", teacher)(inner)
    inner.detach().add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


@every_kind
def test_non_contiguous_logits_and_expanded_gradients(kind):
    student, teacher, _ = draw(33, 130)
    strided, grad = [x.t().contiguous().t() for x in (student, teacher)], torch.ones(()).expand(33)
    assert not strided[0].is_contiguous()
    expected = value_and_gradient(local(kind, teacher), student, grad)
    same(value_and_gradient(local(kind, strided[1]), strided[0], grad), expected)
    same(overwritten(local(kind, strided[1], reuse_logits=True), strided[0], grad), expected)


@every_kind
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixtures_equal_dense_float64(kind, mixture, count, dtype):
    student, *teachers, grad = draw(13, 64, dtype, models=1 + count)
    weights = draw_weights(13, count).to(dtype)
    log_t = dense.mixture(teachers, weights, mixture, 0.7)
    expected = value_and_gradient(reference(kind, log_t, 1.5), student.double(), grad)
    options = {"weight_TM": weights, "mixture": mixture, "temperature": 1.5, "teacher_temperature": 0.7}
    for block in (None, 4):
        options["block_tokens"] = block
        same(value_and_gradient(local(kind, teachers, **options), student, grad), expected, dtype)
        same(overwritten(local(kind, teachers, reuse_logits=True, **options), student, grad), expected, dtype)


@every_kind
@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_teacher_with_all_the_weight_is_alone(kind, mixture):
    student, *teachers, grad = draw(9, 64, models=4)
    teachers[0][:, ::2] = torch.finfo(torch.float32).min  # weight 0 also of what it holds impossible
    for chosen in (1, 2):
        weights = torch.eye(3)[chosen].expand(9, 3)
        ours = value_and_gradient(local(kind, teachers, weight_TM=weights, mixture=mixture), student, grad)
        same(ours, value_and_gradient(local(kind, teachers[chosen]), student, grad))


@every_kind
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_columns_of_a_mixture_contribute_exactly_nothing(kind, mixture, dtype):
    student, *teachers, grad = draw(9, 64, dtype, models=3)
    for logits in (student, *teachers):
        logits[:, 50:] = -torch.inf
    weights = draw_weights(9, 2)
    value, gradient = value_and_gradient(local(kind, teachers, weight_TM=weights, mixture=mixture), student, grad)
    log_t = dense.mixture([x[:, :50] for x in teachers], weights, mixture)
    expected = value_and_gradient(reference(kind, log_t), student[:, :50].double(), grad)
    torch.testing.assert_close(value.double(), expected[0], **EXACT[torch.float32])
    rounding = max(1e-5, torch.finfo(dtype).eps)
    torch.testing.assert_close(gradient[:, :50].double(), expected[1], rtol=rounding, atol=1e-6)
    assert torch.equal(gradient[:, 50:], torch.zeros(9, 14, dtype=dtype))


def test_jensen_shannon_in_equal_parts_is_symmetric_and_below_log_2():
    one, other, _ = draw(33, 130)
    there = local("jensen_shannon", other, {"beta": 0.5})(one)
    torch.testing.assert_close(there, local("jensen_shannon", one, {"beta": 0.5})(other))
    assert (there > 0).all() and (there <= math.log(2)).all()
    one[:, 1::2], other[:, ::2] = -torch.inf, -torch.inf
    apart = local("jensen_shannon", other, {"beta": 0.5})(one)
    torch.testing.assert_close(apart, torch.full((33,), math.log(2)), rtol=1e-6, atol=0)


def test_the_reverse_divergence_is_the_forward_one_of_swapped_models():
    one, other, _ = draw(33, 130)
    torch.testing.assert_close(local("reverse_kl", one)(other), local("forward_kl", other)(one))
    swapped = local("skewed_forward_kl", other, {"skew": 0.2})(one)
    torch.testing.assert_close(local("skewed_reverse_kl", one, {"skew": 0.2})(other), swapped)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "reverse_kl"])
def test_finite_where_the_teacher_has_no_mass(kind):
    student, teacher, grad = draw(9, 64)
    teacher[:, ::3] = -torch.inf
    ours = value_and_gradient(local(kind, teacher), student, grad)
    same(ours, value_and_gradient(reference(kind, dense.log_softmax(teacher)), student.double(), grad))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "forward_kl"])
def test_finite_where_the_student_has_no_mass(kind):
    student, teacher, grad = draw(9, 64)
    low = student.double()
    student[:, ::3], low[:, ::3] = -torch.inf, -1e4  # the log of 0 has no gradient in the reference
    ours = value_and_gradient(local(kind, teacher), student, grad)
    same(ours, value_and_gradient(reference(kind, dense.log_softmax(teacher)), low, grad))
    assert torch.equal(ours[1][:, ::3], torch.zeros(9, 22))
