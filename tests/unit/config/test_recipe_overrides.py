"""``a.b.c=value`` on the command line."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from fire_megatron.config.errors import RecipeError
from fire_megatron.config.load import load_recipe
from fire_megatron.config.loss import HookConfig
from fire_megatron.config.schema import Recipe


@pytest.fixture
def path(values: dict[str, Any], tmp_path: Path) -> Path:
    target = tmp_path / "recipe.yaml"
    target.write_text(yaml.safe_dump(values, sort_keys=False))
    return target


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def get(recipe: Recipe, key: str) -> Any:
    here: Any = recipe
    for part in key.split("."):
        if isinstance(here, tuple):
            here = here[int(part)]
        else:
            here = here[part] if isinstance(here, dict) else getattr(here, part)
    return here


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("run.steps=7", 7),
        ("optimizer.lr=1e-5", 1e-5),
        ("student.parallel.tensor=2", 2),
        ("student.parallel.sequence=null", None),
        ("metrics.tensorboard=true", True),
        ("data.chat_template=on", "on"),
        ("run.name=2026", "2026"),
        ("run.name=true", "true"),
        ("run.dir=a=b", "a=b"),
        ("run.name='quoted'", "quoted"),
        ("data.system_prompt=be brief: yes", "be brief: yes"),
        ("data.system_prompt=[x", "[x"),
        ("data.system_prompt=null", None),
        ("data.system_prompt=", None),
        ("data.train.0.path=x", "x"),
        ("data.train.1.label=123", "123"),
        ("data.train.2.path=new", "new"),
        ("teachers.third.checkpoint=DIR", "DIR"),
        ("teachers.math.labels=[math, algebra]", ("math", "algebra")),
        ("teachers.code.labels.0=c", "c"),
        ("teachers.code.labels.2=7", "7"),
        ("optimizer.betas.1=0.99", 0.99),
        ("student.megatron.attention_dropout=0.1", 0.1),
        ("student.megatron.deep.er=[1]", {"er": [1]}),
        ("loss.hooks=[]", ()),
        ("run.plugins=[a.b]", ("a.b",)),
    ],
)
def test_values(path: Path, override: str, value: Any) -> None:
    key = override.partition("=")[0]
    got = get(load_recipe(path, [override]), "student.megatron.deep" if key.endswith("deep.er") else key)
    assert got == value and type(got) is type(value)


def test_hooks_start_from_their_defaults(path: Path) -> None:
    by_index = load_recipe(path, ["loss.hooks.0.percentile=30"]).loss.hooks
    by_name = load_recipe(path, ["loss.hooks.filter.percentile=30"]).loss.hooks
    assert by_index == by_name == (HookConfig("filter", percentile=30.0), HookConfig("reweight"))


def test_entries_of_one_name_go_by_their_index(path: Path) -> None:
    two = "loss.hooks=[{name: filter}, {name: reweight}, {name: filter, group_by: batch}]"
    message = complaint(path, two, "loss.hooks.filter.percentile=40")
    assert "loss.hooks.filter: several entries have the name; use loss.hooks.0 or loss.hooks.2" in message
    hooks = load_recipe(path, [two, "loss.hooks.2.percentile=40", "loss.hooks.reweight.alpha=2"]).loss.hooks
    assert [hook.options.get("percentile") for hook in hooks] == [20.0, None, 40.0] and hooks[1].options["alpha"] == 2


def test_a_new_hook_is_added_after_the_last(path: Path) -> None:
    hooks = load_recipe(path, ["loss.hooks.2.name=mine", "loss.hooks.2.depth=3"]).loss.hooks
    assert hooks[2] == HookConfig("mine", depth=3) and len(hooks) == 3


def test_the_last_override_wins(path: Path) -> None:
    assert load_recipe(path, ["run.steps=5", "run.steps=6"]).run.steps == 6


def test_lists_and_sections_that_the_file_leaves_out(path: Path, values: dict[str, Any]) -> None:
    recipe = load_recipe(path, ["evaluation.prompts.0.path=a", "evaluation.prompts.1.path=b"])
    assert [source.path for source in recipe.evaluation.prompts] == ["a", "b"]
    values["data"] = None
    path.write_text(yaml.safe_dump(values))
    assert load_recipe(path, ["data.train.0.path=a"]).data.train[0].path == "a"


def test_yaml_aliases_are_separate_values(path: Path, values: dict[str, Any]) -> None:
    values["teachers"] = {"math": (shared := {"checkpoint": "a"}), "code": shared}
    path.write_text(yaml.safe_dump(values))
    assert "*id001" in path.read_text()
    recipe = load_recipe(path, ["teachers.code.checkpoint=b"])
    assert (recipe.teachers["math"].checkpoint, recipe.teachers["code"].checkpoint) == ("a", "b")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.steps", "override 'run.steps': write it as key=value, for example run.steps=100"),
        ("=5", "override '=5': write it as key=value"),
        ("run..steps=5", "override 'run..steps=5': write it as key=value"),
        ("run.step=5", "override: run.step: unknown key; did you mean run.steps?"),
        ("optimiser.lr=5", "override: optimiser: unknown key; did you mean optimizer?"),
        ("steps=5", "override: steps: unknown key; did you mean run.steps?"),
        ("teachers.new.checkpont=5", "teachers.new.checkpont: unknown key; did you mean teachers.new.checkpoint?"),
        ("run.steps.x=5", "override: run.steps: 3 holds no keys; override run.steps itself"),
        ("run.seed.x.y=5", "run.seed"),
        ("data.train.7.path=x", "data.train.7: not an entry of the list; use 0 to 1 to change an entry, 2 to add one"),
        ("data.train.-1.path=x", "data.train.-1: not an entry of the list"),
        ("evaluation.prompts.1.path=x", "not an entry of the list; use 0 to add the first"),
        ("run.steps=ten", "run.steps: 'ten' is a string; it must be a whole number"),
        ("optimizer.lr=[1", "optimizer.lr: '[1' is not YAML"),
        (
            "run.plugins=a",
            "run.plugins: 'a' is a string; it must be a list (each entry a string, not empty); write [a]",
        ),
        ("data.chat_template=onn", "'onn' is not a choice; did you mean on?"),
        ("loss.hooks.filter.percentil=3", "loss.hooks.0.percentil: unknown key; did you mean loss.hooks.0.percentile?"),
        ("teachers.new.parallel.tensor=2", "teachers.new.checkpoint: missing"),
        ("student=5", "student: 5 is a whole number; it must be a mapping"),
    ],
)
def test_mistakes(path: Path, override: str, expected: str) -> None:
    assert expected in complaint(path, override)


def test_several_unknown_keys_are_reported_at_once(path: Path) -> None:
    message = complaint(path, "run.step=5", "optimiser.lr=1", "run.steps=4")
    assert "run.step: unknown" in message and "optimiser: unknown" in message
