"""FiRe over the global batch gives the same rows and weights however the rows are spread over ranks."""

from dataclasses import replace

import pytest
import torch

from fire_megatron.config.loss import HookConfig
from fire_megatron.fire.apply import apply_hooks
from fire_megatron.fire.batch import FireBatch
from fire_megatron.fire.hooks import build_hooks
from fire_megatron.losses.estimators import sampled_policy_gradient
from fire_megatron.losses.reduction import global_token_count, token_mean
from fire_megatron.metrics.values import reduce_metrics
from fire_megatron.parallel.reducer import Reducer

ROWS, WIDTH = 22, 9
FILTER, REWEIGHT = HookConfig("filter", percentile=40), HookConfig("reweight")
PIPELINES = {
    "none": (),
    "filter": (FILTER,),
    "reweight": (REWEIGHT,),
    "both": (FILTER, REWEIGHT),
    "reversed": (REWEIGHT, FILTER),
    "published": (
        HookConfig("filter", percentile=40, group_by="batch"),
        HookConfig("reweight", group_by="batch", normalise_over="all"),
    ),
}
SPLITS = ["even", "strided", "all on the first", "all on the last", "uneven"]


def whole_batch():
    """The same on every rank; rows 3 (empty) and 5 (NaN) cannot train, rows 7 and 8 are equal."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, WIDTH + 1, (ROWS,), generator=generator)
    lengths[3], lengths[8] = 0, lengths[7]
    tables = torch.rand(3, ROWS, WIDTH, generator=generator)
    tables[:, 8] = tables[:, 7]
    tables[0, 5, 0] = float("nan")
    teacher_B = torch.randint(2, (ROWS,), generator=generator)
    teacher_B[8] = teacher_B[7]
    return FireBatch(
        teacher_B=teacher_B,
        teacher_names=("math", "code", "unused"),
        mask_BR=torch.arange(WIDTH) < lengths[:, None],
        teacher_logp_BR=-3 * tables[0],
        teacher_entropy_BR=2 * tables[1],
        student_entropy_BR=3 * tables[2],
        truncated_B=lengths == WIDTH,
    )


def share(split, rank, size):
    """Rows of a rank."""
    rows = list(range(ROWS))
    cut = {
        "even": [len(rows) * r // size for r in range(size + 1)],
        "all on the first": [0] + [ROWS] * size,
        "all on the last": [0] * size + [ROWS],
        "uneven": [0, *([1, 1, 6][: size - 1]), ROWS],
    }
    return rows[rank::size] if split == "strided" else rows[cut[split][rank] : cut[split][rank + 1]]


def take(batch, rows):
    """These rows, cut to the longest of them, as a rank that holds only them would."""
    index = torch.tensor(rows, dtype=torch.int64)
    width = int(batch.mask_BR[index].sum(-1).max()) if rows else 0
    tables = {k: v[index] for k, v in vars(batch).items() if torch.is_tensor(v)}
    return replace(batch, **{k: v[:, :width] if v.dim() == 2 else v for k, v in tables.items()})


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_global_scope_is_invariant_to_the_split(group, world_size, rank, name, split, micro_batch_size):
    batch, hooks = whole_batch(), build_hooks(PIPELINES[name])
    reference = apply_hooks(batch, hooks, reducer=Reducer(), micro_batch_size=1)
    rows = share(split, rank, world_size)
    mine = apply_hooks(take(batch, rows), hooks, reducer=Reducer(group), micro_batch_size=micro_batch_size)
    assert torch.equal(mine.keep_B, reference.keep_B[rows])
    assert mine.reason == tuple(reference.reason[row] for row in rows)
    # To the bit: the sums behind the weights do not depend on their order.
    assert torch.equal(mine.weight_BR, reference.weight_BR[rows, : mine.weight_BR.shape[1]])
    ours, expected = reduce_metrics(mine.metrics, group=group), reduce_metrics(reference.metrics, group=None)
    assert ours == pytest.approx(expected, rel=1e-9) and set(ours) == set(expected)
    assert ours["fire/dropped/empty"] == ours["fire/dropped/nonfinite"] == 1
    assert ours["teacher/unused/rows"] == 0 and "fire/threshold/unused" not in ours


def test_equal_rows_on_different_ranks_share_their_fate(group, world_size, rank):
    # Every rank holds the same tokens in another order and under another padding; all are at the threshold.
    tokens = torch.tensor([-0.1, -0.2, -0.3, -0.7, -1.1, -1.3, -0.9])
    order = torch.randperm(7, generator=torch.Generator().manual_seed(rank))
    row = torch.nn.functional.pad(tokens[order], (0, rank))[None]
    batch = FireBatch(
        teacher_B=torch.zeros(1, dtype=torch.int64),
        teacher_names=("math",),
        mask_BR=row != 0,
        teacher_logp_BR=row,
        teacher_entropy_BR=-row,
        student_entropy_BR=-row,
        truncated_B=torch.zeros(1, dtype=torch.bool),
    )
    hooks = build_hooks([HookConfig("filter", percentile=50)])
    assert apply_hooks(batch, hooks, reducer=Reducer(group), micro_batch_size=1).keep_B.all()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_summed_gradients_are_those_of_the_whole_batch(group, world_size, rank, split, micro_batch_size):
    batch, hooks = whole_batch(), build_hooks(PIPELINES["both"])
    generator = torch.Generator().manual_seed(1)
    log_prob_BR, old_BR, rollout_BR = -torch.rand(3, ROWS, WIDTH, generator=generator)

    def gradient(rows, reducer):
        """d loss / d log_prob over the whole table, as a sum over this rank's micro-batches; and the loss."""
        part = take(batch, rows)
        selection = apply_hooks(part, hooks, reducer=reducer, micro_batch_size=1)
        width = part.mask_BR.shape[1]
        kept_BR = part.mask_BR & selection.keep_B[:, None]
        tokens = global_token_count(int(kept_BR.sum()), reducer=reducer, device=torch.device("cpu"))
        leaf = log_prob_BR.clone().requires_grad_()
        total = torch.zeros(())
        for first in range(0, len(rows), micro_batch_size):
            micro, piece = rows[first : first + micro_batch_size], slice(first, first + micro_batch_size)
            kept = kept_BR[piece]
            result = sampled_policy_gradient(
                leaf[micro, :width][kept],
                teacher_log_prob=part.teacher_logp_BR[piece][kept],
                rollout_log_prob=rollout_BR[micro, :width][kept],
                weight=selection.weight_BR[piece][kept],
                old_log_prob=old_BR[micro, :width][kept],
            )
            loss = token_mean(result.loss, tokens)
            loss.backward()
            total += loss.detach()
        return torch.zeros_like(log_prob_BR) if leaf.grad is None else leaf.grad, total

    expected = gradient(list(range(ROWS)), Reducer())
    reducer = Reducer(group)
    ours = gradient(share(split, rank, world_size), reducer)
    for value, reference in zip(ours, expected, strict=True):
        # Summed, not averaged: every micro-batch has divided by the tokens of the whole update.
        torch.testing.assert_close(reducer.sum(value), reference, rtol=1e-6, atol=1e-8)
    assert expected[0].ne(0).any()


def test_microbatch_scope_asks_nothing_of_other_ranks(group, world_size, rank):
    # Ranks hold different numbers of micro-batches: a collective would hang.
    hooks = build_hooks([HookConfig(name, scope="microbatch") for name in ("filter", "reweight")])
    batch = take(whole_batch(), share("uneven", rank, world_size))
    mine = apply_hooks(batch, hooks, reducer=Reducer(group), micro_batch_size=3)
    alone = apply_hooks(batch, hooks, reducer=Reducer(), micro_batch_size=3)
    assert torch.equal(mine.keep_B, alone.keep_B) and torch.equal(mine.weight_BR, alone.weight_BR)


def test_reducer_gathers_rows_of_any_number_and_shape(group, world_size, rank):
    reducer = Reducer(group)
    values = torch.full((rank, 2, 3), float(rank))
    gathered = reducer.gather_rows(values)
    assert gathered[:, 0, 0].tolist() == [float(r) for r in range(world_size) for _ in range(r)]
    assert gathered.shape[1:] == (2, 3)
    assert reducer.gather_rows(torch.zeros(0, 2)).shape == (0, 2)


def test_reducer_leaves_its_input_alone(group, world_size, rank):
    reducer = Reducer(group)
    values = torch.tensor([rank, -rank])
    assert reducer.sum(values).tolist() == [sum(range(world_size)), -sum(range(world_size))]
    assert reducer.max(values).tolist() == [world_size - 1, 0]
    assert values.tolist() == [rank, -rank]
    spread = torch.tensor([float(rank)]).expand(3)
    assert reducer.sum(spread).tolist() == [float(sum(range(world_size)))] * 3
