"""Rules on folders and files, and all rules together."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fire_megatron.config.checks import RECIPE_RULES, ROLE_RULES, check_recipe
from fire_megatron.config.errors import RecipeProblems
from fire_megatron.config.load import recipe_from_dict
from fire_megatron.config.rules.facts import Facts

Values = dict[str, Any]
Make = Callable[..., Path]


def complaint(values: Values) -> str:
    with pytest.raises(RecipeProblems) as caught:
        check_recipe(recipe_from_dict(values), world_size=None)
    return str(caught.value)


def test_a_hugging_face_folder_must_be_converted(values: Values, tmp_path: Path, make_checkpoint: Make) -> None:
    hf = make_checkpoint(tmp_path / "hf", converted=False)
    values["teachers"]["math"]["checkpoint"] = str(hf)
    assert complaint(values) == (
        f"teachers.math.checkpoint: {hf} is a Hugging Face folder and must be converted first: "
        f"fire-megatron convert hf-to-megatron --hf {hf} --out {hf}-megatron"
    )
    make_checkpoint(tmp_path / "hf-megatron")
    assert complaint(values).endswith(f"give the checkpoint converted from it, {hf}-megatron")


def test_incomplete_checkpoints(values: Values) -> None:
    folder = Path(values["student"]["checkpoint"])
    (folder / "weights" / ".metadata").unlink()
    assert f"student.checkpoint: {folder} is not a complete checkpoint" in complaint(values)
    (folder / "weights" / ".metadata").touch()
    (folder / "fire_checkpoint.json").write_text("{cut sho")
    assert f"student.checkpoint: {folder} is not a complete checkpoint" in complaint(values)
    (folder / "fire_checkpoint.json").write_text("{}")
    (folder / "config.json").write_text("[]")
    assert f"student.checkpoint: {folder}/config.json: must hold a JSON object" in complaint(values)


def test_a_folder_of_checkpoints_names_the_newest(values: Values, tmp_path: Path, make_checkpoint: Make) -> None:
    for step in ("step_000010", "step_000020"):
        make_checkpoint(tmp_path / "run" / "checkpoints" / step)
    values["student"]["checkpoint"] = str(tmp_path / "run" / "checkpoints")
    assert complaint(values).endswith("give one of them, for example " + str(tmp_path / "run/checkpoints/step_000020"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_writable(values: Values, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    values["run"]["dir"] = str(tmp_path / "locked" / "run")
    assert "locked is not writable; choose another folder" in complaint(values)


def test_a_folder_that_is_not_writable_even_for_root(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != locked and allowed(path, mode))
    values["run"]["dir"] = str(locked / "a" / "run")
    assert f"run.dir: {locked}/a/run cannot be written because {locked} is not writable" in complaint(values)


@pytest.mark.parametrize("converted", [True, False])
@pytest.mark.parametrize("key", ["run", "checkpoint"])
def test_nothing_is_written_into_a_model(
    values: Values, tmp_path: Path, make_checkpoint: Make, key: str, converted: bool
) -> None:
    model = make_checkpoint(tmp_path / "model", converted=converted)
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "models").mkdir()
    for place in ("model", "model/runs/first", "models/../model/new", "link/new"):
        values[key] = {**values.get(key, {}), "dir": str(tmp_path / place)}
        assert complaint(values) == (
            f"{key}.dir: {tmp_path / place} is inside {model}, which holds a model; choose another folder"
        )
    values[key]["dir"] = str(tmp_path / "model-runs")
    check_recipe(recipe_from_dict(values), world_size=None)


def test_a_benchmark_whose_file_has_no_name_for_it(values: Values, tmp_path: Path) -> None:
    path = tmp_path / "a b.jsonl.gz"
    path.touch()
    values["evaluation"] = {"benchmarks": [{"path": str(path)}]}
    assert "evaluation.benchmarks.0.name: 'a b' is not of letters, digits" in complaint(values)


def test_all_problems_are_listed_together(values: Values) -> None:
    values["teachers"]["code"]["labels"] = ["math"]
    values["data"]["train"][1]["path"] = "nowhere.jsonl"
    values["student"]["parallel"] = {"tensor": 3}
    values["optimizer"] = {"mini_batches": 5}
    assert complaint(values).startswith("4 problems in the recipe:\n  - ")


def test_every_rule_passes_alone_when_nothing_is_known(values: Values) -> None:
    facts = Facts(recipe_from_dict(values), None)
    for rule in RECIPE_RULES:
        assert list(rule(facts)) == [], rule.__name__
    for rule in ROLE_RULES:
        assert all(list(rule(role)) == [] for role in facts.roles.values()), rule.__name__
