"""Lines of samples.jsonl."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fire_megatron.config.loss import HookConfig
from fire_megatron.data.records import Prompt
from fire_megatron.data.rollouts import Rollouts, Scores, Target
from fire_megatron.fire.apply import apply_hooks
from fire_megatron.fire.hooks import build_hooks
from fire_megatron.parallel.reducer import Reducer
from fire_megatron.train.samples import choose_rows, sample_lines
from fire_megatron.train.select import fire_batch


@pytest.mark.parametrize(
    ("kept", "most", "expected"),
    [
        ("kkdkkd", 4, [0, 1, 2, 5]),
        ("kkdkkd", 3, [0, 1, 2]),
        ("kkdkkd", 1, [0]),
        ("kkdkkd", 9, [0, 1, 2, 3, 4, 5]),
        ("kkkk", 2, [0, 1]),
        ("dddk", 3, [0, 1, 3]),
        ("dddd", 3, [0, 1, 2]),
        ("kd", 0, []),
        ("", 3, []),
    ],
)
def test_half_of_the_places_are_for_dropped_rows(kept, most, expected):
    assert choose_rows([row == "k" for row in kept], most) == expected


@pytest.fixture
def scored():
    """Ten answers of 0 to 8 tokens and their scores, one of them not a number."""
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 0, 8, 5, 4, 7, 1, 6, 2, 8]

    def rows(scale):
        return tuple(scale * torch.rand(n, generator=generator) for n in lengths)

    rollouts = Rollouts(
        row_ids=tuple(range(20, 30)),
        prompts=tuple(Prompt(i, "math" if i % 2 else "code", (1, 2), f"prompt {i}") for i in range(10)),
        responses=tuple(torch.arange(n) for n in lengths),
        log_probs=rows(-1.0),
        entropies=rows(3.0),
        truncated=tuple(n == 8 for n in lengths),
        weight_version=0,
    )
    scores = Scores(tuple(Target((p.label,)) for p in rollouts.prompts), rows(-4.0), rows(2.0))
    scores.log_probs[7][2] = math.nan
    return rollouts, scores


def select(rollouts, scores, *hooks):
    batch = fire_batch(rollouts, scores, ["math", "code"])
    return apply_hooks(batch, build_hooks(hooks), reducer=Reducer(), micro_batch_size=1)


def decode(ids):
    return " ".join(str(int(i)) for i in ids)


def test_a_line_has_what_trained(scored):
    rollouts, scores = scored
    selection = select(rollouts, scores, HookConfig("filter", percentile=40), HookConfig("reweight"))
    lines = {line["row"]: line for line in sample_lines(rollouts, scores, selection, decode, most=10)}
    assert list(lines) == list(rollouts.row_ids)
    reasons = {row: line["reason"] for row, line in lines.items()}
    assert reasons[21] == "empty" and reasons[27] == "nonfinite"
    assert "below_threshold" in reasons.values() and None in reasons.values()
    for i, (row, line) in enumerate(lines.items()):
        by_token, n = line["by_token"], len(rollouts.responses[i])
        assert line["prompt"] == f"prompt {i}" and line["label"] == line["teacher"] == rollouts.prompts[i].label
        assert "".join(by_token["text"]) == line["response"] == decode(range(n)) and line["tokens"] == n
        assert line["kept"] == bool(selection.keep_B[i])
        expected = {"teacher_log_prob": scores.log_probs[i], "student_log_prob": rollouts.log_probs[i]}
        if reasons[row] not in ("empty", "nonfinite"):
            expected |= {name: selection.details[name][i, :n] for name in ("confidence", "confusion")}
            assert line["threshold"] == float(selection.details["threshold"][i])
            assert line["mean_log_prob"] == pytest.approx(float(scores.log_probs[i].mean()))
        if line["kept"]:
            expected["weight"] = selection.weight_BR[i, :n]
        assert set(by_token) == {"text", *expected}
        for name, values in expected.items():
            assert by_token[name] == pytest.approx(values.tolist(), rel=1e-3, nan_ok=True), name


def test_without_hooks_every_weight_is_one(scored):
    rollouts, scores = scored
    line = next(sample_lines(rollouts, scores, select(rollouts, scores), decode, most=1))
    assert set(line["by_token"]) == {"text", "weight", "teacher_log_prob", "student_log_prob"}
    assert line["by_token"]["weight"] == [1.0] * 3 and "threshold" not in line


def test_a_users_details_are_written_too(scored):
    rollouts, scores = scored
    selection = select(rollouts, scores)
    mine = {"surprise": selection.weight_BR * 2, "luck": torch.arange(10.0), "row": torch.zeros(10)}
    line = next(sample_lines(rollouts, scores, replace(selection, details=mine), decode, most=1))
    assert line["by_token"]["surprise"] == [2.0] * 3 and line["luck"] == 0 and line["row"] == 20


def test_rows_that_nobody_asks_for_are_not_decoded(scored):
    rollouts, scores = scored

    def refuse(ids):
        raise AssertionError("decoded")

    assert not list(sample_lines(rollouts, scores, select(rollouts, scores), refuse, most=0))
