"""What exact divergences over the vocabulary have of their own: mixtures of teachers, limits, what is saved. What all
losses of a token have in common is in test_token_losses.py."""

import math

import dense
import pytest
import torch
from dense import KINDS, overwritten, value_and_gradient
from token_losses import EXACT, draw, draw_weights, same

from fire_megatron.losses.divergences import build_divergence
from fire_megatron.losses.vocab_divergence import divergence

MIXTURES = ["distributions", "log_probs"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def local(kind, teachers, parameters=None, **options):
    built = build_divergence(kind, **(KINDS[kind] if parameters is None else parameters))
    return lambda logits: divergence(logits, teachers, kind=built, group=None, **options)


def reference(kind, log_t, temperature=1.0):
    return lambda logits: dense.divergence(kind, dense.log_softmax(logits, temperature), log_t, **KINDS[kind])


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
