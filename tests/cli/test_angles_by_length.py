"""A run whose rotary angles depend on how long a row is: sampling, scoring and training have the same ones."""

from __future__ import annotations

import pytest
from models import ORIGINAL, save_megatron
from tiny_run import make_inputs, read_metrics, train


@pytest.mark.parametrize(("family", "new_tokens"), [("llama-dynamic", 14), ("phi3", 14), ("phi3", 4)])
def test_what_is_sampled_is_what_is_scored_and_trained(family, new_tokens, tmp_path, capsys):
    inputs = make_inputs(tmp_path)
    for name in ("own", "other"):
        save_megatron(family, inputs / name, seed=int(name == "other"), num_hidden_layers=2)
    teachers = {"math": {"checkpoint": str(inputs / "own")}, "code": {"checkpoint": str(inputs / "other")}}
    held_out = {"prompts": [{"path": str(inputs / "math.jsonl")}], "num_prompts": 6, "max_new_tokens": new_tokens}
    assert 12 < ORIGINAL < 12 + 14, "prompts are of 3 to 12 tokens, so that some rows cross and some do not"
    changes = {
        "run__steps": 2,
        "student__checkpoint": str(inputs / "own"),
        "teachers": teachers,
        "data__max_prompt_tokens": 12,
        "rollout__max_new_tokens": new_tokens,
        "loss__hooks": [],
        "optimizer__lr": 1e-3,
        "evaluation": held_out,
    }
    assert train(inputs, tmp_path / "run", **changes) == 0
    kind, shown = {"phi3": "longrope"}.get(family, "dynamic"), capsys.readouterr()
    for role in ("student", "teachers.math"):
        assert (f"{role}: its {kind} scaling has" in shown.out + shown.err) == (new_tokens == 14)
    lines = read_metrics(tmp_path / "run")
    [before, *_] = [line["eval/math/reverse_kl"] for line in lines if "eval/math/reverse_kl" in line]
    assert before == pytest.approx(0, abs=1e-5), "the teacher is the student"
    ratios = [line["rollout/importance_mean"] for line in lines if "rollout/importance_mean" in line]
    assert len(ratios) == 2 and ratios == pytest.approx([1, 1], abs=1e-5)
