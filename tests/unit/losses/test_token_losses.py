"""What all losses of a token have in common, on one process: equal to dense float64, forward and backward, and exact
where nothing is to be seen."""

import dense
import pytest
import torch
from token_losses import DIVERGENCES, LOSSES, draw, run, same

SHAPES = [(1, 1), (1, 7), (5, 64), (33, 130)]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=str)
every_divergence = pytest.mark.parametrize("loss", DIVERGENCES, ids=str)
either_way = pytest.mark.parametrize("reuse", [False, True])


@every_loss
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_dense_float64(loss, shape, dtype):
    student, teacher, grad = draw(*shape, dtype)
    for each in loss.of_sizes(shape[1]):
        expected = run(each.dense(teacher), student.double(), grad)
        for block in (None, 1, 4):
            ours = run(each.ours(teacher, block_tokens=block), student, grad)
            assert [result.dtype for result in ours] == [dtype] * 2
            same(ours, expected, dtype if not each.listed else torch.float32)


@every_divergence
@pytest.mark.parametrize("temperatures", [(0.5, 1.0), (1.0, 2.5), (3.0, 0.7)])
def test_each_side_has_its_temperature(loss, temperatures):
    student, teacher, grad = draw(9, 64)
    expected = run(loss.dense(teacher, temperatures=temperatures), student.double(), grad)
    same(run(loss.ours(teacher, temperatures=temperatures), student, grad), expected)


@every_loss
@either_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(loss, dtype, reuse):
    student, teacher, grad = draw(9, 1000, dtype)
    value, gradient = run(loss.ours(teacher, reuse_logits=reuse), student, grad, reuse)
    expected = run(loss.dense(teacher), student.double(), grad)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(value.double(), expected[0], rtol=1e-5, atol=1e-5)
    # Rounded once: half a unit in the last place, not more. What a full divergence writes over the logits is rounded in
    # forward and again when it is scaled.
    roundings = 1 + (reuse and loss in DIVERGENCES and not loss.listed)
    smallest = 2.0**-24 if dtype is torch.float16 else 0.0
    tolerance = dict(rtol=torch.finfo(dtype).eps * 0.51 * roundings, atol=2e-8 + smallest * 2 * roundings)
    torch.testing.assert_close(gradient.double(), expected[1], **tolerance)


@every_loss
@either_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_extreme_logits(loss, dtype, reuse):
    rows = torch.tensor([[1e4, -1e4, 0.0, 1e4], [-1e4, -1e4, -1e4, -1e4], [1e4, 9984.0, -1e4, 0.0], [0.0, 1, 2, 3]])
    student, teacher = (x.reshape(-1, 4).to(dtype) for x in torch.broadcast_tensors(rows[:, None], rows[None]))
    for each in loss.of_sizes(4):
        ours = run(each.ours(teacher, reuse_logits=reuse), student, torch.ones(16), reuse)
        expected = run(each.dense(teacher), student.double(), torch.ones(16))
        for value, other, rounding in zip(ours, expected, (1e-5, max(1e-5, torch.finfo(dtype).eps)), strict=True):
            assert value.isfinite().all()
            torch.testing.assert_close(value.double(), other, rtol=rounding, atol=1e-6)


@every_loss
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_columns_contribute_exactly_nothing(loss, temperature, dtype):
    *models, grad = draw(9, 50, dtype)
    wide = [torch.cat((x, torch.full((9, 14), -torch.inf, dtype=dtype)), -1) for x in models]
    temperatures = (temperature, temperature)
    value, gradient = run(loss.ours(wide[1], temperatures=temperatures), wide[0], grad)
    plain = run(loss.ours(models[1], temperatures=temperatures), models[0], grad)
    assert gradient.isfinite().all() and torch.equal(gradient[:, 50:], torch.zeros(9, 14, dtype=dtype))
    torch.testing.assert_close(value, plain[0], rtol=1e-6, atol=1e-6)
    # Of the difference of two terms of up to 20.
    torch.testing.assert_close(gradient[:, :50], plain[1], rtol=max(1e-5, torch.finfo(dtype).eps), atol=1e-5)


@every_divergence
@either_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_tokens_are_exactly_zero_whatever_they_hold(loss, dtype, reuse):
    student, teacher, grad = draw(9, 50, dtype)
    plain = run(loss.ours(teacher, reuse_logits=reuse), student, grad, reuse)
    mask = torch.tensor([True, False, True, False, False, False, True, True, False])
    student[1], student[3, 5], student[4] = torch.nan, torch.inf, -torch.inf
    teacher[5], teacher[8, 0] = torch.nan, torch.inf
    grad[1] = torch.nan
    ours = run(loss.ours(teacher, mask_T=mask, reuse_logits=reuse, block_tokens=4), student, grad, reuse)
    for value, expected in zip(ours, plain, strict=True):
        assert torch.equal(value[~mask], torch.zeros_like(value[~mask]))
        assert torch.equal(value[mask], expected[mask]) and expected[mask].any()


@every_loss
@either_way
def test_no_tokens(loss, reuse):
    logits = torch.randn(0, 10, requires_grad=True)
    value = loss.ours(torch.randn(0, 10), reuse_logits=reuse)(logits)
    assert value.shape == (0,)
    value.sum().backward()
    assert logits.grad.shape == (0, 10)


@every_loss
def test_gradcheck_in_float64(loss):
    student, teacher, _ = draw(4, 9, torch.float64)
    options = {"block_tokens": 3}
    if loss in DIVERGENCES:
        options |= {"temperatures": (0.7, 1.5), "mask_T": torch.tensor([True, False, True, True])}
    for each in loss.of_sizes(9):
        assert torch.autograd.gradcheck(each.ours(teacher, **options), student.clone().requires_grad_())


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_distributions_have_no_divergence(loss, dtype):
    student, _, grad = draw(33, 1000, dtype)
    for each in loss.of_sizes(1000):
        value, gradient = run(each.ours(student.clone()), student, grad)
        assert (value >= 0).all() and (value < 1e-6).all()
        assert (gradient.abs() < 2e-6).all()
    nearly = student + 1e-4 * torch.randn(33, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert (loss.ours(nearly)(student) >= 0).all()


@every_loss
@pytest.mark.parametrize("block", [None, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reused_logits_hold_the_same_gradient(loss, block, dtype):
    student, teacher, grad = draw(33, 130, dtype)
    before, options = teacher.clone(), {"block_tokens": block}
    if loss in DIVERGENCES:
        options |= {"mask_T": torch.arange(33) % 3 > 0, "temperatures": (0.7, 1.0)}
    plain = run(loss.ours(teacher, **options), student, grad)
    same(run(loss.ours(teacher, reuse_logits=True, **options), student, grad, reuse=True), plain, dtype)
    assert torch.equal(teacher, before)


@every_loss
def test_changing_the_logits_before_backward_is_caught(loss):
    student, teacher, _ = draw(5, 64)
    inner = student.requires_grad_() * 1.0
    value = loss.ours(teacher)(inner)
    inner.detach().add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


@every_loss
def test_logits_and_statistics_are_all_that_is_saved(loss):
    student, teacher, grad = draw(33, 130)
    function, saved = loss.ours(teacher), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run(function, student, grad)
    # Of a list its ids and buckets; some statistics; of a divergence over the vocabulary the teacher's logits.
    logits = student.numel() * (2 if loss in DIVERGENCES and not loss.listed else 1)
    assert sum(tensor.numel() for tensor in saved) <= logits + (2 * loss.listed + 9) * 33


@every_divergence
def test_only_a_block_exists_in_full_precision(loss):
    student, teacher, grad = draw(40, 130, torch.bfloat16)
    function, leaf = loss.ours(teacher, block_tokens=4), student.requires_grad_()
    with dense.Allocations() as forward:
        value = function(leaf)
    with dense.Allocations() as backward:
        torch.autograd.grad(value, leaf, grad.float())
    assert max(forward.sizes) == 4 * 130
    assert sorted(backward.sizes)[-2:] == [4 * 130, 40 * 130]  # the gradient itself


@every_loss
def test_non_contiguous_logits_and_expanded_gradients(loss):
    student, teacher, _ = draw(33, 130)
    strided, grad = [x.t().contiguous().t() for x in (student, teacher)], torch.ones(()).expand(33)
    assert not strided[0].is_contiguous()
    expected = run(loss.ours(teacher), student, grad)
    same(run(loss.ours(strided[1]), strided[0], grad), expected)
    same(run(loss.ours(strided[1], reuse_logits=True), strided[0], grad, reuse=True), expected)
