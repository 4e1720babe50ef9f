"""Packs hold every row once, unpadded, and balanced."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from fire_megatron.data.packing import balance, pack_rows, split_by_rows, split_by_tokens

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
