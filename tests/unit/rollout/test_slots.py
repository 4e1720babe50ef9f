"""Rows through slots: each is answered once with its own tokens, whatever its company."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fire_megatron.rollout.slots import Slots

STOP = 7


def script(row: int, position: int) -> int:
    """The token that a model would sample at a position of a row, whatever is around it."""
    return (row * 31 + position * 17 + row * position) % 100 + 10


def expected(row: int, length: int, limit: int) -> list[int]:
    """A row that stops after ``length`` tokens, or at the limit."""
    tokens = [script(row, position) for position in range(limit)]
    return [*tokens[: length - 1], STOP] if length <= limit else tokens


class Device:
    """What a decoder does with slots, with the script for a model."""

    def __init__(self, slots: Slots, lengths: list[int], count: int, columns: int) -> None:
        self.slots, self.lengths = slots, lengths
        self.table = np.full((3, count, columns), np.nan)
        self.places = np.zeros(count, dtype=np.int64)
        self.rows = np.full(count, -1)

    def token(self, row: int, position: int) -> int:
        return STOP if position == self.lengths[row] - 1 else script(row, position)

    def put(self, slot: int, column: int) -> None:
        row, position = self.rows[slot], self.places[slot]
        self.table[:, slot, column] = self.token(row, position), -position, row
        self.places[slot] += 1

    def run(self, admitted: list[tuple[int, int]], rows: int, steps: int) -> np.ndarray:
        self.table[:] = 99.0
        for slot, row in admitted:
            self.rows[slot], self.places[slot] = row, 0
            self.put(slot, 0)
        for step in range(steps):
            for slot in range(rows):
                if self.rows[slot] >= 0:  # also those that have ended: nobody has told the device
                    self.put(slot, 1 + step)
        return self.table[:, :rows, : steps + 1]

    def move(self, sources: list[int], targets: list[int]) -> None:
        self.rows[targets], self.places[targets] = self.rows[sources], self.places[sources]
        self.rows[sources] = -1


def simulate(lengths: list[int], prompts: list[int], count: int, every: int, limit: int):
    """Every row from start to end; answers in the order in which they ended, and the most cached tokens ever needed."""
    slots = Slots(prompts, count, max_new_tokens=limit, stop_ids=[STOP], columns=every + 1)
    device, answers, order, horizon = Device(slots, lengths, count, every + 1), {}, [], 0
    while True:
        admitted = slots.admit()
        order += [row for _, row in admitted]
        steps = slots.steps(every)
        if not admitted and not steps:
            break
        assert slots.busy <= count and slots.span <= count
        assert slots.busy == count or not slots.waiting, "no slot is free while a row waits"
        rows = slots.span
        places = slots.places(rows, steps + 1)
        horizon = max(horizon, slots.cached(steps))
        table = device.run(admitted, rows, steps)
        for slot in slots.active:  # random numbers are those of the positions that the device is at
            first = 0 if slot in [s for s, _ in admitted] else 1
            assert (places[slot, first:] == -table[1, slot, first:]).all()
        tokens, new = slots.take(table, [slot for slot, _ in admitted])
        assert tokens >= 0
        for answer in new:
            assert answer.row not in answers, "answered once"
            answers[answer.row] = answer
        if not slots.waiting and slots.busy < slots.span:
            sources, targets = slots.compact()
            device.move(sources, targets)
            assert slots.span == slots.busy and sorted(slots.active) == list(range(slots.busy))
    return answers, order, horizon


@given(
    lengths=st.lists(st.integers(1, 12), min_size=0, max_size=14),
    count=st.integers(1, 6),
    every=st.integers(1, 9),
    limit=st.integers(1, 10),
    data=st.data(),
)
def test_each_row_is_answered_once_as_if_it_were_alone(lengths, count, every, limit, data):
    prompts = [data.draw(st.integers(1, 20)) for _ in lengths]
    every = min(every, limit)
    answers, order, horizon = simulate(lengths, prompts, count, every, limit)
    assert order == list(range(len(lengths))), "in their order"
    assert sorted(answers) == order
    for row, answer in answers.items():
        assert answer.tokens.tolist() == expected(row, lengths[row], limit)
        assert answer.statistics[0].tolist() == [-p for p in range(len(answer.tokens))]
        assert set(answer.statistics[1].tolist()) == {row}
    assert horizon <= max([p + limit for p in prompts], default=1)


def test_a_row_that_ends_makes_room_at_once():
    lengths = [2, 9, 2, 2, 2]
    answers, order, _ = simulate(lengths, [3] * 5, 2, 1, 9)
    assert list(answers) == [0, 2, 3, 4, 1], "four short rows pass through one slot beside the long one"
    assert order == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("count", [1, 3])
def test_without_rows_there_is_nothing_to_do(count):
    slots = Slots([], count, max_new_tokens=4, stop_ids=[], columns=2)
    assert not slots.admit() and slots.steps(1) == slots.span == slots.busy == 0 and slots.cached(1) == 1
    assert slots.take(np.zeros((3, 1, 2)), []) == (0, [])
