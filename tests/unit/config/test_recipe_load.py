"""Plain values and YAML files to recipes and back: types, ranges, unknown keys, saving."""

import copy
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from fire_megatron.config.errors import RecipeError, RecipeProblems, UserError
from fire_megatron.config.load import load_recipe, recipe_from_dict, recipe_text, recipe_to_dict
from fire_megatron.config.loss import FilterOptions, HookConfig, ImportanceConfig, LossConfig, ReweightOptions
from fire_megatron.config.messages import Hint, parse_hint
from fire_megatron.config.schema import OptimizerConfig, ParallelConfig, Recipe, RolloutConfig, TeacherConfig


def put(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of the values with one dotted key set."""
    result = copy.deepcopy(values)
    *path, last = key.split(".")
    here: Any = result
    for part in path:
        here = here[int(part)] if isinstance(here, list) else here.setdefault(part, {})
    here[int(last) if isinstance(here, list) else last] = value
    return result


def complaint(values: dict[str, Any]) -> str:
    """The message that the values are refused with."""
    with pytest.raises(RecipeProblems) as caught:
        recipe_from_dict(values)
    return str(caught.value)


def test_defaults_are_those_of_the_schema(values: dict[str, Any]) -> None:
    recipe = recipe_from_dict(values)
    assert recipe.run.seed == 1234 and recipe.run.resume == "auto"
    assert recipe.optimizer == OptimizerConfig() and recipe.optimizer.betas == (0.9, 0.95)
    assert recipe.student.parallel == ParallelConfig() and recipe.student.parallel.sequence is None
    assert recipe.teachers["code"].labels == ("python", "sql") and recipe.teachers["math"].labels == ()
    assert list(recipe.teachers) == ["math", "code"], "teachers keep the order of the file"
    assert isinstance(recipe.teachers["math"], TeacherConfig)
    assert [hook.name for hook in recipe.loss.hooks] == ["filter", "reweight"]
    assert recipe.data.train[1].label is None and recipe.evaluation.prompts == ()


def test_whole_numbers_serve_as_numbers(values: dict[str, Any]) -> None:
    temperature = recipe_from_dict(put(values, "rollout.temperature", 1)).rollout.temperature
    assert temperature == 1.0 and type(temperature) is float


def test_a_section_with_nothing_below_it_takes_its_defaults(values: dict[str, Any]) -> None:
    recipe = recipe_from_dict(values | {"optimizer": None, "student": values["student"] | {"megatron": None}})
    assert recipe.optimizer == OptimizerConfig() and recipe.student.megatron == {}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("run.steps", "ten", "run.steps: 'ten' is a string; it must be a whole number, at least 1"),
        ("run.steps", 2.5, "run.steps: 2.5 is a number; it must be a whole number"),
        ("run.steps", True, "run.steps: True is true or false; it must be a whole number"),
        ("run.steps", None, "run.steps: null; it must be a whole number"),
        ("run.name", 7, "run.name: 7 is a whole number; it must be a string, not empty (put it in quotes)"),
        ("optimizer.lr", "fast", "optimizer.lr: 'fast' is a string; it must be a number, above 0"),
        (
            "optimizer.lr",
            float("nan"),
            "optimizer.lr: nan is a number; it must be a number, above 0 and at most 1e+30; infinities",
        ),
        ("optimizer.lr", float("inf"), "infinities and not-a-number are no settings"),
        ("optimizer.lr", 10**400, "infinities and not-a-number are no settings"),
        ("optimizer.betas", [0.9], "optimizer.betas: [0.9] is not allowed; it must be 2 entries long"),
        ("optimizer.betas", [0.9, "x"], "optimizer.betas.1: 'x' is a string"),
        ("metrics.jsonl", "yes", "metrics.jsonl: 'yes' is a string; it must be true or false"),
        ("metrics.jsonl", 1, "metrics.jsonl: 1 is a whole number; it must be true or false"),
        ("student.parallel.sequence", "on", "it must be true or false; or null"),
        ("student.parallel", 2, "student.parallel: 2 is a whole number; it must be a mapping with keys such as tensor"),
        ("teachers", ["math"], "teachers: ['math'] is a list; it must be a mapping"),
        ("teachers", {5: {}}, "teachers: the key 5 is a whole number; put it in quotes"),
        ("loss.hooks", [{"name": "filter", 1: 2}], "loss.hooks.0: the key 1 is a whole number; put it in quotes"),
        ("student.precision", {"fp8": True}, "student.precision.fp8: True is true or false; it must be a mapping with"),
        ("teachers.math.labels", "math", "labels: 'math' is a string; it must be a list (each entry a string, not"),
        ("data.train", {"path": "x"}, "data.train: {'path': 'x'} is a mapping; it must be a list"),
        ("data.train.0", "x.jsonl", "data.train.0: 'x.jsonl' is a string; it must be a mapping with keys such as path"),
        ("data.train.0.limit", "all", "data.train.0.limit: 'all' is a string"),
        ("data.chat_template", True, "data.chat_template: True is not a choice; it must be one of auto, on, off"),
        ("run.resume", "atuo", "run.resume: 'atuo' is not a choice; did you mean auto?"),
        ("student.megatron", [1], "student.megatron: [1] is a list; it must be a mapping"),
        ("student.megatron", {"a": {1: 2}}, "student.megatron.a: the key 1 is a whole number"),
        ("student.megatron", {"a": object}, "student.megatron.a: <class 'object'> is type"),
        ("loss.hooks", {"name": "filter"}, "loss.hooks: {'name': 'filter'} is a mapping; it must be a list"),
        ("loss.hooks", [{"name": "filter", "percentile": "20"}], "loss.hooks.0.percentile: '20' is a string"),
        ("loss.hooks", [{"percentile": 20}], "loss.hooks.0.name: missing; give a string, not empty"),
    ],
)
def test_wrong_types(values: dict[str, Any], key: str, value: Any, expected: str) -> None:
    assert expected in complaint(put(values, key, value))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("run.steps", 0, "run.steps: 0 is not allowed; it must be at least 1"),
        ("run.name", "  ", "run.name: '  ' is not allowed; it must be not empty"),
        ("run.seed", -1, "run.seed: -1 is not allowed; it must be at least 0 and below 2147483648"),
        ("run.collective_timeout", 0, "run.collective_timeout: 0 is not allowed; it must be above 0"),
        ("student.parallel.tensor", 0, "student.parallel.tensor: 0 is not allowed; it must be at least 1"),
        ("teachers.math.parallel.pipeline", -2, "teachers.math.parallel.pipeline: -2 is not allowed"),
        ("teachers.code.labels", ["a", ""], "teachers.code.labels.1: '' is not allowed"),
        ("teachers.code.micro_batch_tokens", 0, "teachers.code.micro_batch_tokens: 0 is not allowed"),
        ("teachers", {}, "teachers: {} is not allowed; it must be not empty"),
        ("data.train", [], "data.train: [] is not allowed; it must be not empty"),
        ("data.train.0.path", "", "data.train.0.path: '' is not allowed"),
        ("data.train.0.limit", -1, "data.train.0.limit: -1 is not allowed"),
        ("rollout.temperature", -0.1, "rollout.temperature: -0.1 is not allowed; it must be at least 0"),
        ("rollout.top_p", 0, "rollout.top_p: 0 is not allowed; it must be above 0 and at most 1"),
        ("rollout.top_p", 1.1, "rollout.top_p: 1.1 is not allowed"),
        ("loss.clip", 0, "loss.clip: 0 is not allowed; it must be above 0"),
        ("loss.importance.low", 2, "loss.importance.low: has no effect with mode truncate; leave it out, or use mask"),
        ("loss.importance", {"mode": "mask", "low": 2}, "loss.importance.low: 2.0 is not below high, which is 2.0"),
        ("loss.importance", {"mode": "off", "high": 3}, "loss.importance.high: has no effect with mode off; leave it"),
        ("loss.hooks", [{"name": "filter", "percentile": 100}], "loss.hooks.0.percentile: 100 is not allowed"),
        (
            "loss.hooks",
            [{"name": "filter", "scope": "world"}],
            "loss.hooks.0.scope: 'world' is not a choice; it must be one of global, microbatch",
        ),
        ("loss.hooks", [{"name": "reweight", "alpha": -1}], "loss.hooks.0.alpha: -1 is not allowed"),
        ("optimizer.lr", 0, "optimizer.lr: 0 is not allowed; it must be above 0"),
        (
            "optimizer",
            {"min_lr": 1, "schedule": "linear"},
            "optimizer.min_lr: 1.0 is above lr, which is 1e-05; lower it or raise lr",
        ),
        (
            "optimizer.guard.spike_window",
            9,
            "optimizer.guard.spike_window: has no effect with spike_factor 0; leave it",
        ),
        ("evaluation.num_prompts", 9, "evaluation.num_prompts: has no effect without prompts; leave it out, or give"),
        ("evaluation.at_end", False, "evaluation.at_end: has no effect without prompts or benchmarks; leave it out"),
        (
            "evaluation",
            {"seed": 1, "benchmarks": [{"path": "a.jsonl", "temperature": 0}]},
            "evaluation.seed: has no effect where every benchmark has temperature 0; leave it out, or raise one",
        ),
        (
            "rollout",
            {"prompts_per_step": 1, "max_new_tokens": 1, "temperature": 0, "top_p": 0.5},
            "rollout.top_p: has no",
        ),
        (
            "evaluation.benchmarks",
            [{"path": "a.jsonl", "temperature": 0, "top_p": 0.5}],
            "evaluation.benchmarks.0.top_p: has no effect at temperature 0, which takes the likeliest token; leave it",
        ),
        (
            "loss.hooks",
            [{"name": "filter", "percentile": 0, "group_by": "batch"}],
            "loss.hooks.0.group_by: has no effect with percentile 0, which keeps all; leave it out, or raise",
        ),
        (
            "loss.hooks",
            [{"name": "reweight", "alpha": 0, "beta": 0, "normalise_over": "all"}],
            "loss.hooks.0.normalise_over: has no effect with alpha and beta 0, where every weight is 1; leave it out",
        ),
        (
            "student.precision.fp8",
            {"amax_history": 16},
            "student.precision.fp8.amax_history: has no effect with recipe tensorwise; leave it out, or take recipe",
        ),
        ("optimizer.min_lr", 1, "optimizer.min_lr: has no effect with schedule constant; leave it out, or use linear"),
        (
            "optimizer",
            {"micro_batch_size": 2, "micro_batch_tokens": 64},
            "optimizer.micro_batch_size: 2 has no effect, since micro_batch_tokens is 64; leave out one of them",
        ),
        ("optimizer.micro_batch_tokens", -1, "optimizer.micro_batch_tokens: -1 is not allowed"),
        ("optimizer.betas", [0.9, 1], "optimizer.betas.1: 1 is not allowed; it must be at least 0 and below 1"),
        (
            "loss",
            {"student_temperature": 2.0},
            "loss.student_temperature: has no effect with estimator sampled; leave it out, or use full or topk",
        ),
        (
            "loss",
            {"estimator": "full", "skew": 0.2},
            "loss.skew: has no effect with divergence reverse_kl; leave it out, or use skewed_forward_kl or skewed_rev",
        ),
        ("loss", {"estimator": "full", "clip": 0.3}, "loss.clip: has no effect with estimator full; leave it out, or"),
        ("loss.divergence", "kl", "loss.divergence: 'kl' is not"),
        ("loss.beta", 1, "loss.beta: 1 is not allowed; it must be above 0 and below 1"),
        ("checkpoint.keep", 0, "checkpoint.keep: 0 is not allowed; it must be at least 1"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], key: str, value: Any, expected: str) -> None:
    message = complaint(put(values, key, value))
    assert message.startswith(expected) and "\n" not in message, "one problem alone"


def test_a_teachers_name_becomes_a_part_of_metric_names(values: dict[str, Any]) -> None:
    values["teachers"]["a/b"] = values["teachers"]["math"]
    assert "teachers: 'a/b' is no name; it must be letters, digits, - and _" in complaint(values)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("run.step", "run.step: unknown key; did you mean run.steps?"),
        ("optimiser", "optimiser: unknown key; did you mean optimizer?"),
        ("teachers.math.parallel.tensors", "teachers.math.parallel.tensors: unknown key; did you mean teachers.math."),
        ("teachers.math.parallel.TENSOR", "did you mean teachers.math.parallel.tensor?"),
        ("optimizer.group_size", "optimizer.group_size: unknown key; did you mean rollout.group_size?"),
        ("run.tensor", "did you mean student.parallel.tensor or teachers.NAME.parallel.tensor?"),
        ("checkpoint.xyzzy", "checkpoint.xyzzy: unknown key; the keys here are every, dir, keep, final"),
        ("data.train.0.labels", "data.train.0.labels: unknown key; did you mean data.train.0.label?"),
    ],
)
def test_unknown_keys_name_the_nearest(values: dict[str, Any], key: str, expected: str) -> None:
    assert expected in complaint(put(values, key, 1))


def test_unknown_options_of_a_builtin_hook(values: dict[str, Any]) -> None:
    message = complaint(put(values, "loss.hooks", [{"name": "filter"}, {"name": "filter", "percentil": 3}]))
    assert "loss.hooks.1.percentil: unknown key; did you mean loss.hooks.1.percentile?" in message


def test_options_of_other_hooks_are_theirs_to_check(values: dict[str, Any]) -> None:
    recipe = recipe_from_dict(put(values, "loss.hooks", [{"name": "mine", "depth": 3, "names": ["a"]}]))
    assert recipe.loss.hooks == (HookConfig("mine", depth=3, names=["a"]),)


def test_options_of_builtin_hooks_are_complete_and_inline(values: dict[str, Any]) -> None:
    recipe = recipe_from_dict(put(values, "loss.hooks", [{"name": "filter", "percentile": 30}]))
    assert FilterOptions(**recipe.loss.hooks[0].options) == FilterOptions(percentile=30.0)
    assert recipe_to_dict(recipe)["loss"]["hooks"] == [
        {"name": "filter", "percentile": 30.0, "scope": "global", "group_by": "teacher", "drop_truncated": False}
    ]
    assert recipe_from_dict(put(values, "loss.hooks", [])).loss.hooks == ()


def test_everything_wrong_is_reported_at_once(values: dict[str, Any]) -> None:
    del values["run"]["name"]
    values = put(put(put(values, "optimizer.lr", -1), "rollout.top", 1), "teachers.code.parallel.tensor", "two")
    message = complaint(values)
    assert message.startswith("4 problems in the recipe:\n  - ")
    for part in ("run.name: missing", "optimizer.lr: -1", "rollout.top: unknown", "teachers.code.parallel.tensor"):
        assert part in message


def test_missing_sections(values: dict[str, Any]) -> None:
    del values["student"], values["rollout"]["max_new_tokens"]
    message = complaint(values)
    assert "student: missing; give a mapping" in message
    assert "rollout.max_new_tokens: missing; give a whole number, at least 1" in message


def test_sections_built_in_python_check_themselves() -> None:
    with pytest.raises(UserError, match="lr: -1 is not allowed; it must be above 0"):
        OptimizerConfig(lr=-1)
    with pytest.raises(RecipeError, match="percentile: 100 is not allowed"):
        FilterOptions(percentile=100)
    with pytest.raises(RecipeError, match="mode: 'clip' is not a choice; it must be one of truncate, mask, off"):
        ImportanceConfig(mode="clip")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="percentile: 100"):
        LossConfig(hooks=(HookConfig("filter", percentile=100),))
    with pytest.raises(RecipeError, match="prompts_per_step: missing"):
        RolloutConfig()


def test_recipes_are_frozen(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="frozen"):
        recipe_from_dict(values).run.steps = 5  # type: ignore[misc]


def test_values_given_are_not_changed_or_shared(values: dict[str, Any]) -> None:
    values["student"]["megatron"] = {"a": [1]}
    before = copy.deepcopy(values)
    recipe = recipe_from_dict(values)
    recipe.student.megatron["a"].append(2)
    assert values == before


def test_round_trip_through_a_file(values: dict[str, Any], tmp_path: Path) -> None:
    values["data"]["system_prompt"] = "Zeile 1\n\tyes: no # ümläut: 'x' \"y\" 1e-5"
    values["student"]["megatron"] = {"init_method_std": 1e-5, "norm": None, "list": [1, "on", "1e5", "010", "12:30"]}
    values["loss"] = {"hooks": [{"name": "mine", "b": 1, "a": 1.5}, {"name": "reweight", "alpha": 0}]}
    recipe = recipe_from_dict(values)
    assert recipe_from_dict(recipe_to_dict(recipe)) == recipe
    (tmp_path / "recipe.yaml").write_text(recipe_text(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_other_yaml_readers_get_the_same_values(values: dict[str, Any]) -> None:
    values["data"]["chat_template"] = "on"
    values["data"]["system_prompt"] = "1_000"
    recipe = recipe_from_dict(values)
    assert yaml.safe_load(recipe_text(recipe)) == recipe_to_dict(recipe)


def test_errors_name_the_file(values: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(put(values, "run.steps", 0)))
    with pytest.raises(RecipeError, match=r"bad\.yaml: run\.steps: 0 is not allowed"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty; a recipe has sections"),
        (b"- a\n- b\n", "is not a mapping; a recipe has sections"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"run: {name: a\x00}", "unacceptable character"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=expected):
        load_recipe(path)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "two_teachers.yaml").write_text("")
    with pytest.raises(RecipeError, match=r"no such recipe file; did you mean .*two_teachers\.yaml\?"):
        load_recipe(tmp_path / "two_teacher.yaml")
    with pytest.raises(RecipeError, match="no such recipe file; give the path"):
        load_recipe(tmp_path / "nowhere" / "x.yaml")
    with pytest.raises(RecipeError, match="cannot be read .Is a directory"):
        load_recipe(tmp_path)


def test_reading_a_recipe_loads_neither_torch_nor_megatron() -> None:
    modules = ["checks", "checkpoints", "docs", "load"]  # which import the others
    imports = ", ".join(f"fire_megatron.config.{name}" for name in modules)
    code = f"import sys, {imports}; sys.exit(bool({{'torch', 'megatron', 'numpy', 'transformers'}} & set(sys.modules)))"
    root = str(Path(__file__).resolve().parents[3])
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": root}, timeout=30)


def numbers(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Hint]]:
    """Every number of a section, and what is allowed."""
    for name, field in section.model_fields.items():
        key, hint = f"{prefix}{name}", parse_hint(field)
        while hint.origin in (dict, tuple):
            hint = parse_hint(hint.item())
        if hint.is_section:
            yield from numbers(hint.type, f"{key}.")
        elif hint.type in (int, float):
            yield key, hint


def test_every_number_has_an_upper_bound() -> None:
    found = dict(numbers(Recipe)) | dict(numbers(FilterOptions)) | dict(numbers(ReweightOptions))
    assert len(found) > 60 and {"run.collective_timeout", "alpha", "optimizer.betas"} <= found.keys()
    assert [key for key, hint in found.items() if not re.search("below|at most", hint.limits)] == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.collective_timeout", 1e300),
        ("student.vocab_multiple", 10**9),
        ("run.steps", 10**30),
        ("loss.student_temperature", 1e300),
        ("optimizer.guard.spike_window", 10**9),
    ],
)
def test_enormous_numbers(values: dict[str, Any], key: str, value: float) -> None:
    assert re.fullmatch(
        rf"{key}: .* is not allowed; it must be .* (below|at most) \S+", complaint(put(values, key, value))
    )


def test_types_of_the_loaded_recipe(values: dict[str, Any]) -> None:
    assert isinstance(recipe_from_dict(values), Recipe)
