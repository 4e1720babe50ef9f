"""Packs hold every row once, unpadded, and balanced; context ranks' parts hold every token once."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fire_megatron.data.packing import balance, fill_by_tokens, pack_rows, split_by_rows, split_by_tokens
from fire_megatron.models.packed import packed_seq_params, row_chunks

lengths_strategy = st.lists(st.integers(1, 500), min_size=0, max_size=60)


@given(lengths_strategy, st.integers(1, 9))
def test_balance_is_a_partition_within_one_longest_row_of_even(lengths, bins):
    shares = balance(lengths, bins)
    assert sorted(row for share in shares for row in share) == list(range(len(lengths)))
    loads = [sum(lengths[row] for row in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)


@given(lengths_strategy, st.integers(1, 700))
def test_split_by_tokens_keeps_order_and_budget(lengths, budget):
    batches = split_by_tokens(range(len(lengths)), lengths, budget)
    assert [row for batch in batches for row in batch] == list(range(len(lengths)))
    assert all(len(batch) == 1 or sum(lengths[row] for row in batch) <= budget for batch in batches)


@given(lengths_strategy, st.integers(1, 700), st.randoms(use_true_random=False))
def test_fill_by_tokens_is_a_partition_that_keeps_the_budget(lengths, budget, random):
    batches = fill_by_tokens(range(len(lengths)), lengths, budget)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    loads = [sum(lengths[row] for row in batch) for batch in batches]
    assert all(len(batch) == 1 or load <= budget for batch, load in zip(batches, loads, strict=True))
    # Nothing would fit into an earlier one: a later one's first row did not.
    for (batch, load), (later, _) in itertools.combinations(zip(batches, loads, strict=True), 2):
        assert load + lengths[later[0]] > budget or load > budget, (batch, later)
    firsts = [lengths[batch[0]] for batch in batches]
    assert firsts == sorted(firsts, reverse=True)
    shuffled = random.sample(range(len(lengths)), len(lengths))
    assert fill_by_tokens(shuffled, lengths, budget) == batches  # the same on every rank


@pytest.mark.parametrize(
    ("lengths", "batches"),
    [
        ([6, 4, 3, 3, 2, 2], [[0, 1], [2, 3, 4, 5]]),
        ([7, 6, 4, 3], [[0, 3], [1, 2]]),  # the tightest fit: first-fit agrees
        ([6, 5, 4, 2, 3], [[0, 2], [1, 4, 3]]),
        ([7, 5, 5, 2, 12], [[4], [0, 3], [1, 2]]),
        ([5, 7, 3, 2], [[1, 2], [0, 3]]),
        ([], []),
    ],
)
def test_fill_by_tokens_takes_the_tightest_that_fits(lengths, batches):
    assert fill_by_tokens(range(len(lengths)), lengths, 10) == batches


def test_split_by_rows():
    assert split_by_rows([4, 2, 7, 1, 0], 2) == [[4, 2], [7, 1], [0]]
    assert split_by_rows([], 2) == []


def test_pack_selects_the_positions_that_predict_the_response():
    prompts = [torch.tensor([10, 11, 12]), torch.tensor([20])]
    responses = [torch.tensor([13, 14]), torch.tensor([21, 22, 23])]
    pack = pack_rows(prompts, responses, [1, 0], multiple=4, device=torch.device("cpu"))
    assert pack.token_ids.tolist() == [[20, 21, 22, 23, 10, 11, 12, 13, 14, 0, 0, 0]]
    assert pack.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2]]
    assert pack.cu_seqlens.tolist() == [0, 4, 9, 12]
    assert pack.targets.tolist() == [21, 22, 23, 13, 14]
    # The logits at position i predict token i + 1.
    assert pack.token_ids[0, pack.select + 1].tolist() == pack.targets.tolist()
    assert pack.rows == (1, 0) and pack.response_lengths == (3, 2)
    assert pack.padding.tolist() == [[False] * 9 + [True] * 3] and pack.real_lengths == (4, 5)


def test_pack_of_no_rows_is_padding_that_predicts_nothing():
    pack = pack_rows([], [], [], multiple=2, device=torch.device("cpu"))
    assert pack.token_ids.shape == (1, 2) and pack.select.numel() == 0 and pack.rows == ()
    assert pack.padding.all() and pack.real_lengths == ()


def test_a_pack_that_fits_has_no_padding():
    rows = [torch.arange(3), torch.arange(1)]
    pack = pack_rows(rows, rows, [0, 1], multiple=2, device=torch.device("cpu"))
    assert pack.padding.shape == (1, 8) and not pack.padding.any() and sum(pack.real_lengths) == 8


rows_strategy = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 20)), min_size=0, max_size=8)


def make_rows(sizes):
    """Prompts and responses of these lengths whose tokens are all different and not 0."""
    tokens = torch.arange(1, 1 + sum(map(sum, sizes))).split([n for pair in sizes for n in pair])
    return list(tokens[::2]), list(tokens[1::2])


@given(rows_strategy, st.integers(2, 4), st.integers(1, 3), st.data())
def test_context_parts(sizes, ranks, multiple, data):
    prompts, responses = make_rows(sizes)
    rows = data.draw(st.permutations(range(len(sizes))))[: data.draw(st.integers(0, len(sizes)))]
    options = {"multiple": multiple, "device": torch.device("cpu")}
    whole = pack_rows(prompts, responses, rows, **options)
    parts = [pack_rows(prompts, responses, rows, **options, context=ranks, context_rank=r) for r in range(ranks)]
    sequences = [torch.cat((prompts[r], responses[r])).tolist() for r in rows]
    seen, starts = {}, parts[0].cu_seqlens.tolist()
    for rank, part in enumerate(parts):
        assert part.rows == whole.rows and part.response_lengths == whole.response_lengths
        assert torch.equal(part.cu_seqlens, parts[0].cu_seqlens)
        # As many tokens on each rank, of each row: equal work, and sequence parallelism can split it.
        assert part.token_ids.shape == (1, starts[-1] // ranks) and part.token_ids.shape[1] % multiple == 0
        local = packed_seq_params(part).cu_seqlens_q.tolist()
        for number, (first, last) in enumerate(itertools.pairwise(local)):
            length = starts[number + 1] - starts[number]
            assert last - first == length // ranks
            chunk = length // (2 * ranks)
            for half, index in ((0, rank), (1, 2 * ranks - 1 - rank)):
                here = slice(first + half * chunk, first + (half + 1) * chunk)
                assert part.position_ids[0, here].tolist() == list(range(index * chunk, (index + 1) * chunk))
            row = sequences[number] if number < len(rows) else []
            row = row + [0] * (length - len(row))
            for place in range(first, last):
                assert part.token_ids[0, place] == row[part.position_ids[0, place]]
                seen[number, int(part.position_ids[0, place])] = None
        # The attention's view of the chunks is that of the tokens.
        for own, row, position in row_chunks(packed_seq_params(part)):
            assert part.position_ids[0, own][0] == position
            assert row.stop - row.start == part.position_ids[0, own][-1] + 1
        # Every position that predicts a response token does, whichever rank has that token.
        after = {pair[0]: pair[1] for sequence in sequences for pair in itertools.pairwise(sequence)}
        assert part.targets.tolist() == [after[int(token)] for token in part.token_ids[0, part.select]]
        assert part.targets.tolist() == whole.targets[part.context.places].tolist()
    assert len(seen) == starts[-1]
    assert sorted(torch.cat(parts[0].context.shares).tolist()) == list(range(len(whole.targets)))
    # The order in which keys are put together is that of the whole rows.
    gathered = torch.cat([part.token_ids[0] for part in parts])[parts[0].context.order]
    for start, sequence in zip(starts, sequences, strict=False):
        assert gathered[start : start + len(sequence)].tolist() == sequence


def test_padding_for_context_is_less_than_two_tokens_a_rank_and_row():
    prompts, responses = make_rows([(3, 5), (4, 5), (1, 0)])
    pack = pack_rows(prompts, responses, [0, 1, 2], multiple=1, device=torch.device("cpu"), context=2, context_rank=1)
    assert pack.cu_seqlens.tolist() == [0, 8, 20, 24]
    assert pack.token_ids.tolist() == [[3, 4, 5, 6, 12, 13, 14, 15, 16, 17, 0, 0]]
    assert pack.targets.tolist() == [4, 5, 6, 7, 13, 14, 15, 16, 17]
    assert pack.local_lengths == (4, 5, 0)
