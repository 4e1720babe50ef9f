"""Finished rows are handed over in groups of one size, in the order in which they were finished."""

import pytest
import torch

from fire_megatron.rollout.finished import FinishedRows


@pytest.mark.parametrize(
    ("size", "expected"),
    [(2, [[4, 1], [3, 0], [2]]), (5, [[4, 1, 3, 0, 2]]), (1, [[4], [1], [3], [0], [2]]), (0, [[4, 1, 3, 0, 2]])],
)
def test_groups(size, expected):
    groups = []
    rows = FinishedRows(lambda ids, responses: groups.append((list(ids), [r.tolist() for r in responses])), size)
    for row in (4, 1, 3, 0, 2):
        rows.add(row, torch.tensor([row] * (row + 1)))
    before = len(groups)
    rows.close()
    rows.close()  # nothing is left
    assert [ids for ids, _ in groups] == expected
    assert all(response == [row] * (row + 1) for ids, rest in groups for row, response in zip(ids, rest, strict=True))
    assert before == (5 // size if size else 0), "full groups do not wait for the end"


def test_nobody_wants_them():
    rows = FinishedRows(None, 1)
    rows.add(0, torch.tensor([1]))
    rows.close()
