"""An update keeps the GPU busy: the host neither reads from it nor waits for a copy within a micro-batch, and nothing
is sent within a group of one rank, whatever the layout."""

from __future__ import annotations

import json

import pytest
import update_on_paper
from processes import call

FULL, TOPK = {"estimator": "full"}, {"estimator": "topk", "top_k": 4}
CASES = {
    "one rank, full": [0, 1, {}, FULL],
    "replicas, topk": [1, 2, {}, TOPK],
    "tensor": [1, 2, {"tensor": 2}, {}],
    "first stage": [0, 2, {"pipeline": 2}, {}],
    "last stage": [1, 2, {"pipeline": 2}, {}],
    "context, full": [3, 4, {"context": 2}, FULL],
}
EXPERTS = {"experts": [1, 2, {"expert": 2}, {}]}
"""Whose dispatch has to know numbers of tokens; their replicas are groups of one, beside the others' two."""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    cases = json.dumps(CASES | EXPERTS)
    return json.loads(call(update_on_paper.__file__, tmp_path_factory.mktemp("paper"), read=cases))


@pytest.mark.parametrize("case", CASES)
def test_the_host_waits_as_often_for_many_micro_batches_as_for_few(found, case):
    assert found[case]["few"], "there is something to wait for: the gradient's norm"
    assert found[case]["many"] == found[case]["few"]


@pytest.mark.parametrize("case", CASES | EXPERTS)
def test_nothing_is_sent_within_a_group_of_one(found, case):
    assert found[case]["lone"] == []


def test_stages_send_each_other_hidden_states_and_nothing_else(found):
    # Of four micro-batches, each of 8 + 6 tokens and 64 float32: forward and back, and forward for the old log-probs.
    once, twice = [4, 4 * 14 * 64 * 4], [8, 8 * 14 * 64 * 4]
    assert found["first stage"]["messages"] == {"send": twice, "receive": once}
    assert found["last stage"]["messages"] == {"send": once, "receive": twice}
