"""Folders of runs, whole and not."""

from __future__ import annotations

import json

import pytest

from fire_megatron.config.checkpoints import MARKER, WEIGHTS
from fire_megatron.config.errors import UserError
from fire_megatron.report.read import read_run
from fire_megatron.train.status import RunStatus, write_status

RECIPE = "run: {name: first, steps: 9}\nteachers: {math: {}, code: {}}\n"


def write_lines(path, lines, end=""):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + end, encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(RECIPE)
    return run


def read(folder, max_samples=100, max_tokens=1000):
    return read_run(folder, max_samples=max_samples, max_tokens=max_tokens)


def test_a_run_in_progress(folder):
    lines = [{"step": 1, "loss": 2.0}, {"step": 1, "eval/math/reverse_kl": 0.5}, {"step": 2}]
    write_lines(folder / "metrics.jsonl", lines, end='{"step": 3, "lo')
    write_lines(folder / "samples.jsonl", [{"step": 1, "row": 0}], end='{"step": 2, "row"')
    run = read(folder)
    assert (run.name, run.steps_done, run.total_steps, run.teachers) == ("first", 2, 9, ("math", "code"))
    assert run.metrics[0] == lines[0] | lines[1], "a step and its evaluation"
    assert run.num_samples == 1 and run.notes == ()


def test_a_run_without_a_step(folder):
    run = read(folder)
    assert (run.steps_done, run.metrics, list(run.samples), run.num_samples, run.checkpoints) == (0, (), [], 0, ())


def test_without_a_recipe_or_with_one_that_cannot_be_read(folder):
    write_lines(folder / "metrics.jsonl", [{"step": 1, "teacher/physics/rows": 3.0}])
    (folder / "recipe.yaml").unlink()
    run = read(folder)
    assert (run.name, run.total_steps, run.teachers, run.recipe_text) == ("run", None, ("physics",), "")
    for text in ("a: [", "[1]", "run: 3\nteachers: x"):
        (folder / "recipe.yaml").write_text(text)
        run = read(folder)
        assert run.name == "run" and run.recipe_text == text and run.total_steps is None
    (folder / "recipe.yaml").write_text("a: [")
    assert "recipe cannot be read" in read(folder).notes[0]


def test_damaged_lines_are_left_out_and_said(folder):
    (folder / "metrics.jsonl").write_bytes(
        b'{"step": 2, "loss": 1}\n\xff\n[]\n{"step": "x"}\n{"step": 1, "loss": 3}\n{"step": 2, "loss": 7}\n'
    )
    (folder / "samples.jsonl").write_bytes(b'{"row": 1}\n{"step": 1, "row": 2}\n{"step": 1, broken\n')
    run = read(folder)
    assert [(line["step"], line["loss"]) for line in run.metrics] == [(1, 3), (2, 7)], "by step, the last of each"
    assert [line["row"] for line in run.samples] == [2]
    assert run.notes == ("3 damaged lines of metrics.jsonl left out", "2 damaged lines of samples.jsonl left out")


def test_a_resumed_run_with_another_recipe(folder):
    (folder / "recipe_from_000010.yaml").write_text(RECIPE.replace("9", "30"))
    (folder / "recipe_from_000004.yaml").write_text(RECIPE.replace("9", "20"))
    run = read(folder)
    assert run.total_steps == 30 and [step for step, _ in run.recipe_changes] == [4, 10]
    assert "-run: {name: first, steps: 20}\n+run: {name: first, steps: 30}" in run.recipe_changes[1][1]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_only_complete_checkpoints_count(folder, tmp_path, elsewhere):
    checkpoints = (tmp_path / "elsewhere") if elsewhere else folder / "checkpoints"
    if elsewhere:
        (folder / "recipe.yaml").write_text(f"{RECIPE}checkpoint: {{dir: {checkpoints}}}\n")
    for name in ("step_000020", "step_000005", "step_000030", ".tmp_step_000040", "steps"):
        (checkpoints / name / WEIGHTS).mkdir(parents=True)
        (checkpoints / name / WEIGHTS / ".metadata").touch()
        if name != "step_000030":
            (checkpoints / name / MARKER).write_text("{}")
    assert read(folder).checkpoints == (5, 20)


@pytest.mark.parametrize(
    ("most", "steps"),
    [
        (100, [*range(1, 11)]),
        (30, [*range(1, 11)]),
        (29, [1, 2, 3, 4, 5, 7, 8, 9, 10]),
        (9, [1, 5, 10]),
        (7, [1, 10]),
        (5, [10]),
    ],
)
def test_of_many_samples_whole_steps_are_taken(folder, most, steps):
    lines = [{"step": step, "row": row} for step in range(1, 11) for row in range(3)]
    write_lines(folder / "samples.jsonl", lines)
    run = read(folder, most)
    assert run.num_samples == 30 and len(run.samples) <= most
    assert sorted({line["step"] for line in run.samples}) == steps
    assert [line["row"] for line in run.samples] == [0, 1, 2] * len(steps)
    assert [line["row"] for line in read(folder, 2).samples] == [0, 1] and len(read(folder, 0).samples) == 0


@pytest.mark.parametrize(
    ("most", "steps"),
    [
        (165, [*range(1, 11)]),
        (164, [1, 2, 3, 4, 5, 7, 8, 9, 10]),
        (50, [1, 5, 10]),
        (33, [1, 10]),
        (32, [10]),
    ],
)
def test_of_many_tokens_whole_steps_are_taken(folder, most, steps):
    """Each of 3 lines of a step has its number of tokens; a text that looks like a count is none."""
    text = '"tokens": 900, "step": 3,'
    lines = [{"step": step, "row": row, "prompt": text, "tokens": step} for step in range(1, 11) for row in range(3)]
    write_lines(folder / "samples.jsonl", lines)
    run = read(folder, max_tokens=most)
    assert run.num_samples == 30 and sum(line["tokens"] for line in run.samples) <= most
    assert sorted({line["step"] for line in run.samples}) == steps and len(run.samples) == 3 * len(steps)
    assert [line["row"] for line in read(folder, max_tokens=29).samples] == [0, 1]
    assert len(read(folder, max_tokens=9).samples) == 0


def test_what_became_of_it(folder):
    assert (read(folder).state, read(folder).error) == ("", "")
    write_status(folder, RunStatus(state="failed", error="step 3: loss not finite"))
    assert (read(folder).state, read(folder).error) == ("failed", "step 3: loss not finite")
    for text in ("{", "[]", '{"state": null}'):
        (folder / "status.json").write_text(text)
        assert read(folder).state == ""


def test_what_is_not_a_run(folder, tmp_path):
    with pytest.raises(UserError, match=r"runn: no such folder; did you mean .*/run\?"):
        read(tmp_path / "runn")
    with pytest.raises(UserError, match=r"no such folder; give the run.dir"):
        read(tmp_path / "a" / "b")
    with pytest.raises(
        UserError, match=r"neither metrics.jsonl nor recipe.yaml there\); give one, for example .*/run$"
    ):
        read(tmp_path)
    (folder / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"give one, for example .*/run$"):
        read(folder / "checkpoints")
    with pytest.raises(UserError, match=r"recipe.yaml: no such folder"):
        read(folder / "recipe.yaml")
