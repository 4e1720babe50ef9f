"""The output layer fused with a loss over chunks against the unfused expression in dense float64."""

from dataclasses import replace

import dense
import pytest
import torch
from dense import KINDS
from gpu_products import TORCHES, pretend_gpu
from hypothesis import given
from hypothesis import strategies as st
from token_losses import Loss

from fire_megatron.losses import fused, products
from fire_megatron.losses.fused import OutputLayer, chunked_linear_loss, chunks, map_chunks
from fire_megatron.losses.topk import TopK, top_k

TOKENS, COLUMNS, ROWS, HIDDEN = 23, 30, 37, 12
LOSSES = {
    "divergence": Loss("reverse_kl"),
    "divergence over the logits": Loss("reverse_kl"),
    "topk_divergence": Loss("reverse_kl", 5),
    "log_prob_and_entropy": Loss("log_prob"),
}
CPU = torch.device("cpu")


class Case:
    """Hidden states, a weight of which the last rows are vocabulary padding, and every loss on its logits."""

    def __init__(self, dtype=torch.float32, tokens=TOKENS):
        generator = torch.Generator().manual_seed(tokens)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden, self.weight = draw(tokens, HIDDEN).to(dtype), draw(ROWS, HIDDEN).to(dtype)
        self.weight[COLUMNS:] = torch.nan  # must not be read
        self.teacher, self.scale = draw(tokens, COLUMNS).to(dtype), draw(tokens)
        ids = top_k(self.teacher.float(), 5, group=None, vocab_start=0).ids_TK
        exact = dense.buckets(dense.log_softmax(self.teacher), ids)
        self.top_k = TopK(ids, exact[:, :-1], exact[:, -1])
        self.parts, self.shapes, self.with_grad = [], [], []

    def token_loss(self, name, kind=None):
        """Of a chunk; reports the value and the number of each token."""
        loss, reuse = self.loss(name, kind), {"reuse_logits": True} if "over" in name else {}

        def function(logits, part):
            self.parts.append(part)
            self.shapes.append(tuple(logits.shape))
            self.with_grad.append(logits.requires_grad)
            scale = self.scale[part].to(torch.promote_types(logits.dtype, torch.float32))
            value = loss.ours(self.teacher[part], found=self.top_k[part] if loss.listed else None, **reuse)(logits)
            return (value * scale).sum(), torch.stack((value, torch.arange(len(self.scale))[part].to(value.dtype)))

        return function

    @staticmethod
    def loss(name, kind=None):
        return replace(LOSSES[name], kind=kind) if kind else LOSSES[name]

    def dense_run(self, name, kind=None):
        """Loss, values, and gradients of hidden states and weight, on full logits."""
        hidden, weight = self.hidden.double().requires_grad_(), self.weight.double().requires_grad_()
        loss = self.loss(name, kind)
        values = loss.dense(self.teacher, found=self.top_k if loss.listed else None)(hidden @ weight[:COLUMNS].t())
        total = (values * self.scale).sum()
        return total.detach(), values.detach(), *torch.autograd.grad(total, (hidden, weight))

    def run(self, token_loss, upstream=1.0, **options):
        """The same of ours, on what :func:`chunked_linear_loss` returns; the inputs stay as they are."""
        hidden, weight = self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()
        total, report = chunked_linear_loss(hidden, weight, token_loss, columns=COLUMNS, **options)
        assert not report.requires_grad
        total.backward(torch.tensor(upstream, dtype=total.dtype))
        assert torch.equal(hidden.detach(), self.hidden)
        assert torch.equal(weight.detach()[:COLUMNS], self.weight[:COLUMNS])
        return total.detach(), report[0], hidden.grad, weight.grad


@pytest.fixture(autouse=True)
def tiles_that_do_not_divide(monkeypatch):
    for kind in ("cpu", "cuda"):
        monkeypatch.setitem(products._TILE_ELEMENTS, kind, 8 * HIDDEN)


def sum_of_logits(logits, part):
    return logits.float().sum(), torch.zeros(1, len(logits))


def far(ours, expected):
    """Relative distance of two tensors as a whole."""
    return ((ours.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("chunk", [0, 1, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_the_unfused_loss(loss, chunk, dtype):
    case = Case(dtype)
    total, values, of_hidden, of_weight = case.run(case.token_loss(loss), chunk_tokens=chunk)
    expected = case.dense_run(loss)
    full = torch.float64 if dtype is torch.float64 else torch.float32
    assert [x.dtype for x in (total, values, of_hidden, of_weight)] == [full, full, dtype, dtype]
    # In bfloat16 only the result is rounded: logits, and the gradient that is written over them, are of float32.
    exact = 1e-13 if dtype is torch.float64 else 1e-5
    torch.testing.assert_close(total.double(), expected[0], rtol=exact, atol=exact)
    torch.testing.assert_close(values.double(), expected[1], rtol=exact, atol=exact)
    rounding = max(exact, torch.finfo(dtype).eps * 0.51)
    torch.testing.assert_close(of_hidden.double(), expected[2], rtol=rounding, atol=exact)
    torch.testing.assert_close(of_weight.double()[:COLUMNS], expected[3][:COLUMNS], rtol=rounding, atol=exact)
    assert torch.equal(of_weight[COLUMNS:], torch.zeros(ROWS - COLUMNS, HIDDEN, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_temperature_divides_logits_in_value_and_gradients(dtype):
    case, temperature = Case(dtype), 0.6
    loss = next(iter(LOSSES))
    ours = case.run(case.token_loss(loss), chunk_tokens=4, temperature=temperature)
    hidden, weight = case.hidden.double().requires_grad_(), case.weight.double().requires_grad_()
    values = case.loss(loss).dense(case.teacher)(hidden @ weight[:COLUMNS].t() / temperature)
    total = (values * case.scale).sum()
    expected = (total, values, *torch.autograd.grad(total, (hidden, weight)))
    exact = 1e-12 if dtype is torch.float64 else 1e-5
    for i, (mine, reference) in enumerate(zip(ours, expected, strict=True)):
        rounding = max(exact, torch.finfo(dtype).eps * 0.51) if i > 1 else exact
        used = slice(None) if i != 3 else slice(COLUMNS)
        torch.testing.assert_close(
            mine.double()[used] if i else mine.double(), reference[used] if i else reference, rtol=rounding, atol=exact
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", list(LOSSES)[:3])
def test_every_divergence_equals_the_unfused_one(kind, loss):
    case = Case(torch.float64)
    total, values, of_hidden, of_weight = case.run(case.token_loss(loss, kind), chunk_tokens=5)
    expected = case.dense_run(loss, kind)
    expected = (*expected[:3], expected[3][:COLUMNS])
    for ours, reference in zip((total, values, of_hidden, of_weight[:COLUMNS]), expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("release", TORCHES)
def test_as_on_a_gpu(loss, dtype, release, monkeypatch):
    pretend_gpu(monkeypatch, release)
    case = Case(dtype)
    total, values, of_hidden, of_weight = case.run(case.token_loss(loss), chunk_tokens=4)
    expected = case.dense_run(loss)
    assert [x.dtype for x in (total, values, of_hidden, of_weight)] == [torch.float32, torch.float32, dtype, dtype]
    torch.testing.assert_close(total.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values.double(), expected[1], rtol=1e-5, atol=1e-5)
    # The gradient of logits is rounded as a factor, and the sums once.
    rounding = torch.finfo(dtype).eps
    assert far(of_hidden, expected[2]) < rounding and far(of_weight[:COLUMNS], expected[3][:COLUMNS]) < rounding
    assert torch.equal(of_weight[COLUMNS:], torch.zeros(ROWS - COLUMNS, HIDDEN, dtype=dtype))


@pytest.mark.parametrize("release", [None, *TORCHES])
def test_bfloat16_weight_gradients_of_many_chunks_add_up_in_float32(release, monkeypatch):
    if release:
        pretend_gpu(monkeypatch, release)
    # Each chunk adds 2^-9 of the sum, which bfloat16 would lose.
    hidden = torch.full((1024, 2), 2.0**-9, dtype=torch.bfloat16)
    weight = torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True)
    total, _ = chunked_linear_loss(hidden, weight, sum_of_logits, chunk_tokens=1)
    (gradient,) = torch.autograd.grad(total, weight)
    assert torch.equal(gradient, torch.full((3, 2), 2.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("segments", [(), (5, 0, 11, 7), (1, 1, 21), (0, 23)])
@pytest.mark.parametrize("chunk", [0, 4])
def test_no_chunk_crosses_a_segment_and_reports_are_in_order(segments, chunk):
    case = Case(torch.float64)
    hidden = case.hidden.requires_grad_()
    token_loss = case.token_loss("divergence")
    total, report = chunked_linear_loss(
        hidden, case.weight, token_loss, columns=COLUMNS, segments=segments, chunk_tokens=chunk
    )
    assert [index for part in case.parts for index in range(TOKENS)[part]] == list(range(TOKENS))
    borders = {sum(segments[:count]) for count in range(len(segments))}
    assert not any(border in range(part.start + 1, part.stop) for part in case.parts for border in borders)
    assert max(part.stop - part.start for part in case.parts) <= (chunk or TOKENS)
    expected = case.dense_run("divergence")
    torch.testing.assert_close(report, torch.stack((expected[1], torch.arange(TOKENS).double())))
    torch.testing.assert_close(total, expected[0])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("segments", [(), (0, 0)])
def test_no_tokens(loss, segments):
    case = Case(tokens=0)
    total, values, of_hidden, of_weight = case.run(case.token_loss(loss), segments=segments)
    assert case.shapes == [(0, COLUMNS)] and case.parts == [slice(0, 0)]
    assert total == 0 and values.shape == (0,) and of_hidden.shape == (0, HIDDEN)
    assert torch.equal(of_weight, torch.zeros(ROWS, HIDDEN))


def test_no_columns():
    case = Case()
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    total, _ = chunked_linear_loss(hidden, weight, sum_of_logits, columns=0, chunk_tokens=4)
    total.backward()
    assert torch.equal(hidden.grad, torch.zeros(TOKENS, HIDDEN))
    assert torch.equal(weight.grad, torch.zeros(ROWS, HIDDEN))


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck_in_float64(loss):
    case = Case(torch.float64, tokens=5)

    def function(hidden, weight):
        return chunked_linear_loss(hidden, weight, case.token_loss(loss), chunk_tokens=2)[0]

    inputs = [x[:, :3].clone().requires_grad_() for x in (case.hidden, case.weight[:COLUMNS])]
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("upstream", [1.0, -2.0, 1 / 3, 0.0, 2.0**17])
@pytest.mark.parametrize("release", [None, TORCHES[0]])
def test_the_upstream_gradient_scales_and_is_not_rounded(dtype, upstream, release, monkeypatch):
    if release:
        pretend_gpu(monkeypatch, release)
        monkeypatch.setattr(torch.Tensor, "item", lambda _: pytest.fail("the host waits for the device"))
    case = Case(dtype)
    case.scale *= 2.0**-12  # in float16 neither overflows
    total, _, of_hidden, of_weight = case.run(case.token_loss("divergence"))
    scaled = case.run(case.token_loss("divergence"), upstream=upstream)
    assert of_hidden.any() and of_weight.any() and torch.equal(total, scaled[0])
    assert torch.equal(scaled[2], (of_hidden.float() * torch.tensor(upstream)).to(dtype))
    # The weight's is rounded after scaling alone. A power of two does not round, but for float16's smallest numbers.
    rtol, atol = 0 if upstream != 1 / 3 else torch.finfo(dtype).eps, 2.0**-24 * max(1, abs(upstream))
    torch.testing.assert_close(scaled[3].double(), of_weight.double() * upstream, rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("before", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1 / 3])
def test_gradients_are_rounded_once(kind, before, scale, monkeypatch):
    monkeypatch.setattr(fused, "device_kind", lambda _: kind)
    values, scale = torch.randn(500, generator=torch.Generator().manual_seed(0)).to(before), torch.tensor(scale)
    expected = (values.float() * scale).bfloat16()
    assert torch.equal(fused._scaled(values, scale, torch.bfloat16), expected)


@pytest.mark.parametrize("upstream", [1.0, -2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("release", [None, TORCHES[0]])
def test_each_backward_adds_the_same_gradient(dtype, upstream, release, monkeypatch):
    if release:
        pretend_gpu(monkeypatch, release)
    case = Case(dtype)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    total, _ = chunked_linear_loss(hidden, weight, case.token_loss("divergence"), columns=COLUMNS)
    scale = torch.tensor(upstream)
    total.backward(scale, retain_graph=True)
    once = hidden.grad.clone(), weight.grad.clone()
    assert once[0].any() and once[1].any()
    for times, kept in ((2, True), (4, False)):
        total.backward(scale * times / 2, retain_graph=kept)
        assert torch.equal(hidden.grad, times * once[0]) and torch.equal(weight.grad, times * once[1])


@pytest.mark.parametrize("loss", LOSSES)
def test_without_grad_no_gradient_is_computed(loss):
    case = Case()
    expected = case.run(case.token_loss(loss), chunk_tokens=4)
    assert all(case.with_grad)
    case.with_grad.clear()
    with torch.no_grad(), dense.Allocations() as made:
        hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
        total, report = chunked_linear_loss(hidden, weight, case.token_loss(loss), columns=COLUMNS, chunk_tokens=4)
    assert case.with_grad == [False] * 6 and not total.requires_grad
    assert max(made.sizes) == 4 * COLUMNS  # and not [V, H] or [N, H]
    torch.testing.assert_close(total, expected[0])
    torch.testing.assert_close(report[0], expected[1])


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_only_the_gradient_that_is_needed_is_computed(wanted, monkeypatch):
    case = Case()
    *_, of_hidden, of_weight = case.run(case.token_loss("divergence"), chunk_tokens=4)
    unwanted = {"hidden": "add_weight_gradient", "weight": "hidden_gradient"}[wanted]
    monkeypatch.setattr(fused, unwanted, lambda *_: pytest.fail(f"{unwanted} was called"))
    getattr(case, wanted).requires_grad_()
    token_loss = case.token_loss("divergence")
    total, _ = chunked_linear_loss(case.hidden, case.weight, token_loss, columns=COLUMNS, chunk_tokens=4)
    total.backward()
    assert torch.equal(getattr(case, wanted).grad, {"hidden": of_hidden, "weight": of_weight}[wanted])
    assert (case.weight if wanted == "hidden" else case.hidden).grad is None


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_logits_never_exist(loss, dtype):
    case = Case(dtype, tokens=160)
    with dense.Allocations() as made:
        case.run(case.token_loss(loss), chunk_tokens=16)
    assert set(case.shapes) == {(16, COLUMNS)}
    # A tenth of them, or the hidden states' gradient.
    assert max(made.sizes) == max(16 * COLUMNS, 160 * HIDDEN) < 160 * COLUMNS


def test_an_output_layer_projects_into_memory_that_it_takes_again():
    case = Case(torch.bfloat16)
    layer = OutputLayer(case.weight, COLUMNS)
    first = layer.logits(case.hidden[:7])
    expected = case.hidden.double() @ case.weight[:COLUMNS].double().t()
    assert first.dtype == torch.float32 and not first.requires_grad
    torch.testing.assert_close(first.double(), expected[:7], rtol=1e-5, atol=1e-5)
    second = layer.logits(case.hidden[7:12])
    torch.testing.assert_close(second.double(), expected[7:12], rtol=1e-5, atol=1e-5)
    assert second.data_ptr() == first.data_ptr()
    layer.release()
    third = layer.logits(case.hidden)
    torch.testing.assert_close(third.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [0, TOKENS])
def test_scoring_in_chunks_equals_full_logits(tokens):
    case = Case(tokens=tokens)
    layer, shapes = OutputLayer(case.weight.requires_grad_(), COLUMNS), []

    def score(logits, part):
        shapes.append(logits.shape[0])
        return torch.stack((logits.sum(-1), torch.arange(tokens)[part].float()))

    scores = map_chunks(case.hidden.requires_grad_(), layer, score, chunk_tokens=4)
    expected = (case.hidden @ case.weight[:COLUMNS].t()).sum(-1), torch.arange(tokens).float()
    torch.testing.assert_close(scores, torch.stack(expected).detach())
    assert not scores.requires_grad and max(shapes) == min(4, tokens) and sum(shapes) == tokens


@given(st.lists(st.integers(0, 60), max_size=5), st.integers(0, 20), st.integers(0, 2**28))
def test_chunks_cover_all_tokens_in_order_within_their_segments(segments, most, columns):
    slices = chunks(sum(segments), columns, CPU, most, segments)
    assert [index for part in slices for index in range(part.start, part.stop)] == list(range(sum(segments)))
    lengths = [part.stop - part.start for part in slices]
    assert all(0 < length <= (most or sum(segments)) for length in lengths)
    assert all(length == 1 or length * columns <= fused._CHUNK["cpu"][0] for length in lengths if not most)
    for last in range(len(segments)):
        first, border = sum(segments[:last]), sum(segments[: last + 1])
        inside = [part for part in slices if first <= part.start < border]
        assert all(part.stop <= border for part in inside)
        lengths = [part.stop - part.start for part in inside]
        assert len({*lengths[:-1], *([most] if most and len(inside) > 1 else [])}) <= 1  # all but the last alike
        assert not inside or lengths[-1] <= lengths[0]
        assert not most or len(inside) == -(-(border - first) // most)


@given(st.integers(0, 200), st.integers(1, 20))
def test_chunks_without_segments_are_those_of_one(tokens, most):
    assert chunks(tokens, 100, CPU, most) == chunks(tokens, 100, CPU, most, [tokens])


@pytest.mark.parametrize(("columns", "tokens"), [(151936, 832), (18992, 7040), (100, 8192), (2**22, 32), (2**30, 1)])
def test_chunks_of_a_gpu(columns, tokens):
    """Half a GiB of float32 logits, and numbers of tokens that matrix products like."""
    assert {part.stop - part.start for part in chunks(10 * tokens, columns, torch.device("cuda"))} == {tokens}
    assert tokens * columns <= 2**27 or tokens == 1
