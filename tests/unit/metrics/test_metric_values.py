"""Metric values add up to what reducing over ranks gives."""

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from fire_megatron.metrics.values import Last, Max, Mean, Min, Sum, Value, from_plain, merge, reduce_metrics, to_plain


def test_each_kind_adds_up_in_its_own_way() -> None:
    assert (Mean(1.0, 1) + Mean(9.0, 3)).result == 2.5, "the mean over everything, not a mean of means"
    assert (Sum(1.0) + Sum(2.0)).result == 3.0
    assert (Max(1.0) + Max(2.0)).result == 2.0
    assert (Min(1.0) + Min(2.0)).result == 1.0
    assert (Last(1.0) + Last(2.0)).result == 1.0, "the lowest rank's"


@pytest.mark.parametrize("kind", [Max, Min])
def test_not_a_number_is_never_hidden(kind: Any) -> None:
    assert math.isnan((kind(math.nan) + kind(1.0)).result)
    assert math.isnan((kind(1.0) + kind(math.nan)).result)


def test_merge_refuses_two_kinds_under_one_key() -> None:
    assert merge({"a": Sum(1.0)}, {"a": Sum(2.0), "b": Max(1.0)}) == {"a": Sum(3.0), "b": Max(1.0)}
    with pytest.raises(TypeError, match="metric a is a Sum here and a Max there"):
        merge({"a": Sum(1.0)}, {"a": Max(2.0)})


def test_one_process_reduces_alone() -> None:
    metrics: dict[str, Value] = {"b": Sum(2.0), "a": Mean(3.0, 2), "none": Mean(0.0, 0)}
    assert reduce_metrics(metrics, group=None) == {"a": 1.5, "b": 2.0}
    assert list(reduce_metrics(metrics, group=None)) == ["a", "b"]


def test_the_union_of_the_ranks_keys_is_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks: list[dict[str, Value]] = [
        {"loss": Mean(4.0, 2), "lr": Last(0.1), "peak": Max(3.0), "empty": Mean(0.0, 0)},
        {"loss": Mean(0.0, 0), "lr": Last(0.2), "teacher/code/rows": Sum(5)},
        {},
        {"loss": Mean(2.0, 2), "low": Min(-1.0), "peak": Max(7.0), "teacher/code/rows": Sum(1)},
    ]

    def gather(parts: list[Any], own: dict[str, Value], group: Any) -> None:
        assert own == ranks[1] and group is members
        parts[:] = ranks

    members = SimpleNamespace(size=lambda: len(ranks))
    monkeypatch.setattr(dist, "all_gather_object", gather)
    reduced = reduce_metrics(ranks[1], group=members)  # type: ignore[arg-type]
    assert reduced == {"loss": 1.5, "low": -1.0, "lr": 0.1, "peak": 7.0, "teacher/code/rows": 6}
    assert ranks[0]["loss"] == Mean(4.0, 2), "what was given stays as it was"


def test_values_travel_as_plain_lists() -> None:
    values: dict[str, Value] = {"a": Mean(1.5, 2), "b": Sum(2.0), "c": Max(3.0), "d": Min(4.0), "e": Last(5.0)}
    assert from_plain(json.loads(json.dumps(to_plain(values)))) == values
