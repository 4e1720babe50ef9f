"""Which curves a report has."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from fire_megatron.report.charts import SECTIONS, make_charts
from fire_megatron.report.read import RunData, SampleLines

ROOT = Path(__file__).resolve().parents[3]


def run(*lines, name="run", teachers=("math", "code")):
    return RunData(
        name=name,
        folder=Path(name),
        recipe_text="",
        recipe_changes=(),
        recipe={"teachers": {name: {} for name in teachers}},
        metrics=tuple(lines),
        samples=SampleLines(Path("samples.jsonl")),
        num_samples=0,
        checkpoints=(),
        state="",
        error="",
        notes=(),
    )


def by_title(*runs):
    return {chart["title"]: chart for chart in make_charts(runs)}


def documented_keys():
    """The keys of docs/metrics.md, with a name in place of each placeholder and braces written out."""
    for line in (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").splitlines():
        if not re.match(r"\| `", line):
            continue
        first = ""
        for key in re.findall(r"`([^`]+)`", line.split("|")[1]):
            if key.startswith("..."):  # the key before, with another end; or with another last part
                key = (first.rpartition("/")[0] if key[3] == "/" else first) + key[3:]
            choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(re.split(r"\{([^}]*)\}", key))]
            for parts in itertools.product(*choices):
                yield re.sub(r"<[^>]+>", "math", "".join(parts))
            first = key


def test_every_documented_key_has_a_chart_of_its_own():
    keys = list(documented_keys())
    assert len(keys) > 45 and "fire/token_weight_max" in keys and "time/rollout" in keys
    charts = make_charts([run({"step": 1, **{key: 1.0 for key in keys}})])
    others = [chart["title"] for chart in charts if chart["section"] == "Other"]
    assert not others
    assert sum(len(chart["curves"]) for chart in charts) == len(set(keys))


def test_teachers_are_curves_in_the_recipes_order_with_their_names():
    lines = [{"step": step, "teacher/code/reverse_kl": 2.0, "teacher/math/reverse_kl": 1.0} for step in (1, 2)]
    (chart,) = make_charts([run(*lines)])
    assert (chart["section"], chart["unit"]) == ("Teachers", "nats a token")
    assert [(c["label"], c["name"], c["y"]) for c in chart["curves"]] == [
        ("math", "math", [1.0, 1.0]), ("code", "code", [2.0, 2.0]),
    ]  # fmt: skip
    keep = by_title(run({"step": 1, "fire/keep_ratio": 0.5, "teacher/a+b/keep_ratio": 0.25}))["Keep rate"]["curves"]
    assert [(c["label"], c["name"]) for c in keep] == [("a+b", "a+b"), ("all", None)]


def test_points_that_are_missing_and_points_that_are_not_finite():
    lines = [{"step": 1, "loss": 1.23456789, "x": True}, {"step": 2, "loss": None}, {"step": 3}, {"step": 4, "loss": 2}]
    (chart,) = make_charts([run(*lines)])
    (curve,) = chart["curves"]
    assert curve["at"] == [0, 1, 3] and curve["y"] == [1.2346, None, 2.0]


def test_evaluations_are_drawn_whatever_they_measure():
    lines = [
        {"step": 0, "eval/math/reverse_kl": 9.0, "eval/gsm8k/avg@8": 0.25},
        {"step": 1, "loss": 1.0},
        {"step": 2, "eval/math/reverse_kl": 1.0, "eval/gsm8k/avg@8": 0.5, "eval/aime/avg@8": 0.1},
    ]
    charts = by_title(run(*lines))
    assert {charts[t]["section"] for t in ("Reverse KL on held-out prompts", "avg@8")} == {"Evaluation"}
    assert charts["avg@8"]["unit"] == "fraction"
    assert [(c["name"], c["at"], c["y"]) for c in charts["avg@8"]["curves"]] == [
        ("aime", [2], [0.1]), ("gsm8k", [0, 2], [0.25, 0.5]),
    ]  # fmt: skip


def test_unknown_keys_come_last_and_a_section_is_in_one_piece():
    charts = make_charts([run({"step": 1, "mine/length": 1.0, "loss": 1.0, "time/step": 1.0, "grad_norm": 1.0})])
    assert [chart["title"] for chart in charts] == [
        "Loss", "Gradient norm, before clipping", "Step by phase", "mine/length",
    ]  # fmt: skip
    places = [SECTIONS.index(chart["section"]) for chart in charts]
    assert places == sorted(places)


def test_what_says_little_and_never_changes_is_quiet():
    still = {"skipped/spike": 0.0, "loss": 1.0}
    charts = by_title(run({"step": 1, **still}, {"step": 2, **still}))
    assert charts["Updates skipped in the step"]["quiet"] and not charts["Loss"]["quiet"]
    charts = by_title(run({"step": 1, **still}, {"step": 2, **still, "skipped/spike": 1.0}))
    assert not charts["Updates skipped in the step"]["quiet"]


def test_runs_are_laid_over_each_other():
    one, two = run({"step": 1, "loss": 1.0}), run({"step": 5, "loss": 2.0, "grad_norm": 1.0}, name="other")
    charts = by_title(one, two)
    assert [(c["run"], c["y"]) for c in charts["Loss"]["curves"]] == [(0, [1.0]), (1, [2.0])]
    assert [c["run"] for c in charts["Gradient norm, before clipping"]["curves"]] == [1]
    assert make_charts([run()]) == []
