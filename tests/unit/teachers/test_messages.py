"""What travels between student and teachers arrives as it was sent."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from fire_megatron.data.packing import balance
from fire_megatron.teachers.messages import Answer, Rows

TOKENS = st.lists(st.integers(0, 200_000), max_size=9).map(lambda ids: torch.tensor(ids, dtype=torch.int64))
ROWS = st.lists(st.tuples(TOKENS, TOKENS), max_size=6)


def rows_of(pairs, ids):
    return Rows(list(ids), [prompt for prompt, _ in pairs], [response for _, response in pairs])


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@given(ROWS, st.integers(0, 10**9))
def test_requests(pairs, first):
    rows = rows_of(pairs, range(first, first + len(pairs)))
    flat = rows.pack()
    back = Rows.unpack(flat)
    assert flat.dtype == torch.int32 and flat.dim() == 1
    assert back.ids == rows.ids and same(back.prompts, rows.prompts) and same(back.responses, rows.responses)


@given(st.lists(ROWS, max_size=4), st.randoms(use_true_random=False))
def test_merged_requests_are_in_the_order_of_their_ids(parts, shuffle):
    count = sum(map(len, parts))
    ids = list(range(count))
    shuffle.shuffle(ids)
    requests = []
    for part in parts:
        requests.append(rows_of(part, ids[: len(part)]))
        ids = ids[len(part) :]
    merged = Rows.merged(requests)
    assert merged.ids == list(range(count))
    for request in requests:
        for i, prompt, response in zip(request.ids, request.prompts, request.responses, strict=True):
            assert torch.equal(merged.prompts[i], prompt) and torch.equal(merged.responses[i], response)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 63)), max_size=6), st.floats(0, 1e4, width=32))
def test_answers(described, seconds):
    lengths = [length for length, _ in described]
    log_probs, entropies = ([torch.randn(n) for n in lengths] for _ in range(2))
    answer = Answer(log_probs, entropies, [holder for _, holder in described], seconds)
    flat = answer.pack()
    back = Answer.unpack(flat, lengths)
    assert flat.dtype == torch.float32 and len(flat) == Answer.size(lengths)
    assert same(back.log_probs, log_probs) and same(back.entropies, entropies)
    assert back.holders == answer.holders and back.seconds == seconds


@given(st.lists(st.lists(st.integers(1, 40), max_size=7), max_size=6), st.integers(1, 5))
def test_loads_stay_even_over_groups_that_come_one_after_the_other(groups, bins):
    loads = [0] * bins
    for lengths in groups:
        before = list(loads)
        shares = balance(lengths, bins, loads)
        assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
        expected = [had + sum(lengths[i] for i in share) for had, share in zip(before, shares, strict=True)]
        assert loads == expected
        longest = max((n for group in groups for n in group), default=0)
        assert max(loads) - min(loads) <= longest
