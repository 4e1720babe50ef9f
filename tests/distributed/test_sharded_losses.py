"""Losses of a token, top-k and the fused output layer, the vocabulary sharded over ranks, equal the unsharded ones."""

import pytest
import torch
import torch.distributed as dist
from dense import overwritten, value_and_gradient
from interpreted import by_kernels, needs_triton
from sharded import (
    REAL,
    VOCABULARY,
    draw,
    every_kind,
    every_layout,
    every_loss,
    of,
    same,
    same_on_all_ranks,
    shard,
    sharded,
)
from token_losses import DIVERGENCES, LOSSES, Loss, draw_weights

from fire_megatron.losses import softmax
from fire_megatron.losses.divergences import build_divergence
from fire_megatron.losses.fused import OutputLayer, chunked_linear_loss
from fire_megatron.losses.token_losses import DivergenceSettings, Segment, VocabShard, full_loss
from fire_megatron.losses.topk import top_k
from fire_megatron.losses.vocab_parallel import log_prob_and_entropy, score_log_prob_and_entropy

by_kernel = pytest.mark.parametrize("loss", [loss for loss in LOSSES if not loss.listed], ids=str)


@every_loss
@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_unsharded(group, loss, layout, dtype):
    student, teacher, grad = draw(9, layout, dtype)
    mine, _ = shard(student, layout, group)
    for each in loss.of_sizes(REAL if layout in ("cut", "padded") else VOCABULARY):
        found = each.list(teacher.float()) if each.listed else None
        of_whole = each.ours(teacher.double(), found=found)
        whole = value_and_gradient(of_whole, student.double(), grad)
        for reuse, run in ((False, value_and_gradient), (True, overwritten)):
            options = {"block_tokens": 4, "reuse_logits": reuse, "found": found}
            ours = run(sharded(each, teacher, layout, group, **options), mine, grad)
            assert ours[1].dtype == dtype and ours[1].isfinite().all()
            same(ours, whole, layout, group, roundings=1 + reuse)


# Below 1 the distance of an empty shard's peak from the others' overflows.
@pytest.mark.parametrize("loss", DIVERGENCES, ids=str)
@pytest.mark.parametrize("layout", ["cut", "uneven"])
@pytest.mark.parametrize("temperature", [0.4, 2.0])
def test_equals_unsharded_at_a_temperature(group, loss, layout, temperature):
    student, teacher, grad = draw(9, layout, scale=1.0)
    mine, _ = shard(student, layout, group)
    temperatures = (temperature, 0.8 * temperature)
    found = loss.list(teacher, temperatures[1]) if loss.listed else None
    options = {"temperatures": temperatures, "found": found}
    whole = value_and_gradient(loss.ours(teacher.double(), **options), student.double(), grad)
    for reuse, run in ((False, value_and_gradient), (True, overwritten)):
        blocks = {"reuse_logits": reuse, "block_tokens": 4}
        ours = run(sharded(loss, teacher, layout, group, **options, **blocks), mine, grad)
        same(ours, whole, layout, group)


@needs_triton
@pytest.mark.two_ranks
@by_kernel
@pytest.mark.parametrize("layout", ["cut", "uneven"])
def test_kernels_equal_unsharded(monkeypatch, group, loss, layout):
    by_kernels(monkeypatch)
    test_equals_unsharded(group, loss, layout, torch.float32)


@needs_triton
@pytest.mark.two_ranks
@by_kernel
def test_kernels_equal_unsharded_at_a_temperature(monkeypatch, group, loss):
    by_kernels(monkeypatch)
    if loss in DIVERGENCES:
        test_equals_unsharded_at_a_temperature(group, loss, "cut", 0.4)


@every_kind
@every_layout
@pytest.mark.parametrize("mixture", ["distributions", "log_probs"])
def test_mixtures_equal_unsharded(group, kind, layout, mixture):
    student, *teachers, grad = draw(9, layout, models=4)
    mine, *theirs = (shard(x, layout, group)[0] for x in (student, *teachers))
    options = {"mixture": mixture, "teacher_temperature": 0.7, "weight_TM": draw_weights(9, 3)}
    doubles = [x.double() for x in teachers]
    whole = value_and_gradient(of(kind, doubles, **options), student.double(), grad)
    same(value_and_gradient(of(kind, theirs, group, block_tokens=4, **options), mine, grad), whole, layout, group)
    options |= {"reuse_logits": True, "block_tokens": 4}
    same(overwritten(of(kind, theirs, group, **options), mine, grad), whole, layout, group)


@every_kind
@every_layout
def test_a_float64_teacher_beside_a_float32_student(group, kind, layout):
    student, teacher, grad = draw(9, layout)
    mine, theirs = (shard(x, layout, group)[0] for x in (student, teacher.double()))
    whole = value_and_gradient(of(kind, teacher.double()), student.double(), grad)
    same(value_and_gradient(of(kind, theirs, group), mine, grad), whole, layout, group)


@pytest.mark.parametrize("loss", DIVERGENCES, ids=str)
@pytest.mark.parametrize("reuse", [False, True])
def test_masked_tokens_are_exactly_zero_whatever_they_hold(group, loss, reuse):
    student, teacher, grad = draw(9)
    mask = torch.arange(9) % 3 > 0
    found = loss.list(teacher) if loss.listed else None
    whole = value_and_gradient(loss.ours(teacher.double(), mask_T=mask, found=found), student.double(), grad)
    student[0], teacher[3, 5], student[6, 90] = torch.nan, torch.inf, torch.nan
    mine, _ = shard(student, "even", group)
    run = overwritten if reuse else value_and_gradient
    options = {"mask_T": mask, "reuse_logits": reuse, "block_tokens": 4, "found": found}
    ours = run(sharded(loss, teacher, "even", group, **options), mine, grad)
    same(ours, whole, "even", group)
    assert all(torch.equal(x[~mask], torch.zeros_like(x[~mask])) for x in ours)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(group, loss, dtype):
    # Shard peaks are 2e4 apart, so that most shards' sums rescale to nothing.
    student, teacher, _ = draw(12, "even", dtype)
    student[:4, :48], student[2:6, 0], teacher[4:8, 48:], teacher[6:10, 95] = -1e4, 1e4, -1e4, 1e4
    grad = torch.ones(12)
    mine, _ = shard(student, "even", group)
    found = loss.list(teacher) if loss.listed else None
    whole = value_and_gradient(loss.ours(teacher.double(), found=found), student.double(), grad)
    for reuse, run in ((False, value_and_gradient), (True, overwritten)):
        options = {"reuse_logits": reuse, "block_tokens": 5, "found": found}
        ours = run(sharded(loss, teacher, "even", group, **options), mine, grad)
        assert all(x.isfinite().all() for x in ours)
        same(ours, whole, "even", group)


@needs_triton
@pytest.mark.two_ranks
@by_kernel
def test_kernels_at_the_extremes(monkeypatch, group, loss):
    by_kernels(monkeypatch)
    test_extreme_logits(group, loss, torch.float32)
    if loss in DIVERGENCES:
        test_masked_tokens_are_exactly_zero_whatever_they_hold(group, loss, reuse=True)


@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_top_k_is_the_same_however_the_vocabulary_is_sharded(group, layout, dtype, temperature):
    _, logits, _ = draw(33, layout, dtype)
    logits[:11] = logits[:11].round()  # with many equals
    logits[:2, : REAL if layout == "padded" else None] = 0
    mine, start = shard(logits, layout, group)
    for k in (1, 5, REAL if layout in ("cut", "padded") else VOCABULARY):
        whole = top_k(logits, k, group=None, vocab_start=0, temperature=temperature)
        ours = top_k(mine, k, group=group, vocab_start=start, temperature=temperature, block_tokens=4)
        assert torch.equal(ours.ids_TK, whole.ids_TK) and same_on_all_ranks(ours.ids_TK, group)
        for name in ("log_prob_TK", "tail_log_prob_T"):
            assert same_on_all_ranks(getattr(ours, name), group)
            torch.testing.assert_close(getattr(ours, name), getattr(whole, name), rtol=2e-6, atol=2e-6)


def test_a_tail_far_below_float32_keeps_its_logarithm(group):
    logits = torch.full((2, VOCABULARY), -1e4)
    logits[0, 3] = logits[1, 95] = 1e4
    mine, start = shard(logits, "uneven", group)
    found = top_k(mine, 1, group=group, vocab_start=start)
    assert found.ids_TK.tolist() == [[3], [95]] and torch.equal(found.log_prob_TK, torch.zeros(2, 1))
    torch.testing.assert_close(found.tail_log_prob_T, torch.full((2,), -2e4 + torch.tensor(95.0).log().item()))


@pytest.fixture
def collectives(monkeypatch):
    """Names of the collectives that are called."""
    calls = []

    def counted(name, real):
        def call(*args, **kwargs):
            calls.append(name)
            return real(*args, **kwargs)

        return call

    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "barrier"):
        monkeypatch.setattr(dist, name, counted(name, getattr(dist, name)))
    return calls


@pytest.mark.parametrize("tokens", [0, 33])
@pytest.mark.parametrize("models", [2, 4])
def test_two_collectives_forward_and_none_backward(group, collectives, tokens, models):
    student, *teachers, grad = draw(tokens, models=models)
    mine, *theirs = (shard(x, "even", group)[0].clone() for x in (student, *teachers))
    weights = draw_weights(tokens, models - 1)
    start = shard(student, "even", group)[1]

    def count(value):
        forward = list(collectives)
        value.backward(grad)
        assert collectives == forward and mine.grad.shape == mine.shape
        collectives.clear()
        return forward

    mine.requires_grad_()
    for mixture in ("distributions", "log_probs"):
        options = {"weight_TM": weights, "mixture": mixture, "block_tokens": 4}
        assert count(of("reverse_kl", theirs, group, **options)(mine)) == ["all_gather", "all_reduce"]
    listed = top_k(theirs[0], 5, group=group, vocab_start=start, block_tokens=4)
    assert collectives == ["all_gather", "all_gather"]
    collectives.clear()
    value = Loss("forward_kl", 5).ours(None, group=group, vocab_start=start, found=listed, block_tokens=4)(mine)
    assert count(value) == ["all_gather", "all_reduce"]


def test_logits_that_are_reused_take_two_collectives_a_block(group, collectives):
    student, teacher, _ = draw(33)
    mine, theirs = (shard(x, "even", group)[0].clone() for x in (student, teacher))
    value = of("reverse_kl", theirs, group, reuse_logits=True, block_tokens=11)(mine.requires_grad_())
    assert collectives == ["all_gather", "all_reduce"] * 3
    value.sum().backward()
    assert len(collectives) == 6


@every_kind
def test_the_ranks_of_a_group_need_not_be_those_of_the_world(subgroup, kind):
    group = subgroup(2)
    student, teacher, grad = (x + dist.get_rank() // 2 for x in draw(9))  # each group has its own
    mine, theirs = (shard(x, "even", group)[0] for x in (student, teacher))
    whole = value_and_gradient(of(kind, teacher.double()), student.double(), grad)
    same(value_and_gradient(of(kind, theirs, group), mine, grad), whole, "even", group)


# Of the weight's rows only 40 stand for a token: the last shard has none.
@pytest.mark.parametrize("loss", ["divergence", "divergence over the logits", "topk_divergence", "log_prob"])
def test_the_fused_output_layer_equals_unsharded(group, loss):
    tokens, hidden_size, real = 23, 8, 40
    generator = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = torch.randn(2, tokens, hidden_size, generator=generator).unbind()
    weight, teacher_weight = torch.randn(2, VOCABULARY, hidden_size, generator=generator).unbind()
    target, scale = torch.randint(real, (tokens,), generator=generator), torch.randn(tokens, generator=generator)
    listed = top_k(teacher_hidden @ teacher_weight[:real].t(), 5, group=None, vocab_start=0)

    def run(dtype, rows, columns, group):
        here = {"group": group, "vocab_start": rows.start}
        theirs = teacher_hidden.to(dtype) @ teacher_weight[rows][:columns].to(dtype).t()

        def token_loss(logits, part):
            if loss == "log_prob":
                log_prob, entropy = log_prob_and_entropy(logits, target[part], **here)
                value = log_prob + 0.1 * entropy
            elif loss == "topk_divergence":
                value = Loss("jensen_shannon", 5).ours(None, found=listed[part], **here)(logits)
            else:
                options = {"reuse_logits": True, "block_tokens": 3} if "over" in loss else {}
                value = of("jensen_shannon", theirs[part], group, **options)(logits)
            return (value * scale[part]).sum(), value.detach()[None]

        inputs = hidden.to(dtype).requires_grad_(), weight[rows].to(dtype).requires_grad_()
        options = {"columns": columns, "segments": [9, 0, 14], "chunk_tokens": 5}
        total, report = chunked_linear_loss(*inputs, token_loss, **options)
        return total.detach(), report, *torch.autograd.grad(total, inputs)

    rows = slice(*(VOCABULARY * rank // group.size() for rank in (group.rank(), group.rank() + 1)))
    whole = run(torch.float64, slice(0, VOCABULARY), real, None)
    columns = min(max(real - rows.start, 0), rows.stop - rows.start)
    total, report, of_hidden, of_weight = run(torch.float32, rows, columns, group)
    assert same_on_all_ranks(total, group) and same_on_all_ranks(report, group)
    dist.all_reduce(of_hidden, group=group)
    expected = whole[0], whole[1], whole[2], whole[3][rows]
    for ours, reference in zip((total, report, of_hidden, of_weight), expected, strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=1e-5)
    assert torch.equal(of_weight[columns:], torch.zeros(rows.stop - rows.start - columns, hidden_size))


@pytest.mark.parametrize("reuse", [False, True])
def test_ranks_with_shards_of_different_widths_communicate_alike(group, monkeypatch, reuse):
    # Were it not so, they would wait for each other: the collectives are only counted.
    student, teacher, _ = draw(33)
    mine, theirs = (shard(x, "uneven", group)[0].clone() for x in (student, teacher))
    called = []
    with monkeypatch.context() as patch:
        patch.setitem(softmax._BLOCK_ELEMENTS, "cpu", 4 * VOCABULARY)
        patch.setattr(dist, "all_reduce", lambda *_, **__: called.append("all_reduce"))
        patch.setattr(
            dist, "all_gather", lambda into, x, **_: (called.append("all_gather"), [y.copy_(x) for y in into])
        )
        options = {"reuse_logits": True, "block_tokens": 4} if reuse else {}
        of("reverse_kl", theirs, group, **options)(mine.requires_grad_())
    assert len(called) == (2 * 9 if reuse else 2)
    assert same_on_all_ranks(torch.tensor(len(called)), group)


def test_shards_cut_by_their_own_width_are_refused(group):
    student, teacher, _ = draw(3)
    mine, theirs = (shard(x, "uneven", group)[0].clone() for x in (student, teacher))
    with pytest.raises(AssertionError, match="by their own width"):
        of("reverse_kl", theirs, group, reuse_logits=True)(mine.requires_grad_())


def test_a_full_loss_over_uneven_shards_communicates_alike(group, monkeypatch):
    """As in training: chunks and blocks are cut by the padded width."""
    student, teacher, _ = draw(33)
    mine, start = shard(student, "uneven", group)
    theirs, _ = shard(teacher, "uneven", group)
    calls = []
    real = dist.all_reduce
    monkeypatch.setitem(softmax._BLOCK_ELEMENTS, "cpu", 4 * VOCABULARY)
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **kwargs: (calls.append(1), real(*args, **kwargs))[1])
    head = OutputLayer(theirs.t().contiguous())
    segment = Segment([head], [torch.eye(33, head.weight_VH.shape[1])], torch.ones(33, 1))
    settings = DivergenceSettings(build_divergence("reverse_kl"))
    loss = full_loss([segment], torch.ones(33), settings, shard=VocabShard(group, start, VOCABULARY), tokens=1.0)
    loss(mine.clone().requires_grad_(), slice(0, 33))
    assert len(calls) == 9 and same_on_all_ranks(torch.tensor(len(calls)), group)


def targets(tokens, padding=0):
    """Logits of the whole vocabulary and targets among what is real of it."""
    generator = torch.Generator().manual_seed(tokens)
    logits = torch.randn(tokens, VOCABULARY, generator=generator) * 3
    logits[:, VOCABULARY - padding :] = -torch.inf
    return logits, torch.randint(VOCABULARY - padding, (tokens,), generator=generator)


def test_gradcheck_of_the_shard_in_float64(group):
    # Perturbs the whole vocabulary on all ranks alike: each rank's shard of the dense logits.
    logits, target = targets(3, 90)
    logits, weights = logits.double(), torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).double()

    def value(logits):
        part, start = shard(logits, "even", group)
        return (weights * torch.stack(log_prob_and_entropy(part, target, group=group, vocab_start=start))).sum()

    part, start = shard(logits, "even", group)
    leaf = part.clone().requires_grad_()
    outputs = log_prob_and_entropy(leaf, target, group=group, vocab_start=start)
    (gradient,) = torch.autograd.grad((weights * torch.stack(outputs)).sum(), leaf)
    for row in range(3):
        for column in range(VOCABULARY - 90):
            step = torch.zeros_like(logits)
            step[row, column] = 1e-6
            numeric = (value(logits + step) - value(logits - step)) / 2e-6
            if start <= column < start + part.shape[1]:
                torch.testing.assert_close(gradient[row, column - start], numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("tokens", [0, 33])
@pytest.mark.parametrize("with_entropy", [True, False])
def test_log_probs_take_two_all_reduces_forward_and_none_backward(group, collectives, tokens, with_entropy):
    logits, target = targets(tokens)
    part, start = shard(logits, "even", group)
    part = part.clone().requires_grad_()
    options = {"group": group, "vocab_start": start, "with_entropy": with_entropy, "block_tokens": 4}
    log_prob, entropy = log_prob_and_entropy(part, target, **options)
    assert collectives == ["all_reduce", "all_reduce"]
    (log_prob.sum() + (entropy.sum() if with_entropy else 0)).backward()
    assert len(collectives) == 2 and part.grad.shape == part.shape


def test_scoring_equals_the_differentiable_entry(group):
    logits, target = targets(33, 5)
    part, start = shard(logits, "even", group)
    scored = score_log_prob_and_entropy(part, target, group=group, vocab_start=start)
    for value, expected in zip(scored, log_prob_and_entropy(part, target, group=group, vocab_start=start), strict=True):
        assert torch.equal(value, expected)


def test_a_target_that_no_shard_holds_is_visible_on_every_rank(group):
    part, start = shard(targets(2)[0], "even", group)
    log_prob, _ = log_prob_and_entropy(part, torch.tensor([VOCABULARY, 3]), group=group, vocab_start=start)
    assert log_prob.isnan().tolist() == [True, False]
