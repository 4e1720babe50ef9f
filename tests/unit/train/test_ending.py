"""The tables that a run ends with."""

import json

from fire_megatron.metrics.logger import HELD_OUT_FILE
from fire_megatron.train.ending import end_tables, held_out_answers


def of(name, **scores):
    return {f"eval/{name}/{key.replace('_', '@')}": value for key, value in scores.items()}


def test_only_what_was_measured_has_a_table():
    kl, scores = {"eval/math/reverse_kl": 2.0}, of("aime", avg_1=0.25, pass_1=0.25, maj_1=0.25)
    assert end_tables({}, {}, []) == ""
    alone = end_tables(scores, scores, [])
    assert "Reverse KL" not in alone and alone.startswith("% right on benchmarks\n")
    assert "benchmarks" not in end_tables(kl, kl, ["math"]) and "math     1 " in end_tables(kl, kl, ["math"])
    both = end_tables(kl | scores, kl | scores, ["math"])
    assert both.index("Reverse KL") < both.index("% right") and "\n\n% right" in both


def test_scores_before_and_after():
    before = of("aime", avg_8=0.125, pass_8=0.5, maj_8=0.25, pass_2=0.2, truncated=0.5)
    after = of("aime", avg_8=0.25, pass_8=0.5, maj_8=0.0, pass_2=0.3, truncated=0.0) | of("new", avg_1=1.0, maj_1=1.0)
    lines = end_tables(before, after, []).splitlines()
    assert [line.split() for line in lines[3:]] == [
        ["aime", "avg@8", "12.5", "25.0", "+12.5"],
        ["aime", "pass@8", "50.0", "50.0", "+0.0"],
        ["aime", "maj@8", "25.0", "0.0", "-25.0"],
        ["new", "avg@1", "-", "100.0", "-"],
    ]


def test_an_answer_before_and_after(tmp_path):
    path = tmp_path / HELD_OUT_FILE
    assert held_out_answers(tmp_path) == ""
    lines = [{"step": step, "prompt": "What is 2?", "answer": f" It is {step}.\n"} for step in (0, 5, 10)]
    path.write_text(json.dumps(lines[0]) + "\n")
    assert held_out_answers(tmp_path) == "", "asked once"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert held_out_answers(tmp_path).splitlines()[2:] == [
        "--- prompt", "What is 2?", "--- after step 0", "It is 0.", "--- after step 10", "It is 10."
    ]  # fmt: skip
