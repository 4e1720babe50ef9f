"""Checks across sections and against the JSON of the checkpoints."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fire_megatron.config.checks import CHECKS, Context, check_recipe
from fire_megatron.config.errors import RecipeProblems
from fire_megatron.config.load import recipe_from_dict

Values = dict[str, Any]
Make = Callable[..., Path]


def complaint(values: Values, world_size: int | None = None) -> str:
    with pytest.raises(RecipeProblems) as caught:
        check_recipe(recipe_from_dict(values), world_size=world_size)
    return str(caught.value)


@pytest.mark.parametrize("world_size", [None, 1, 2, 7])
def test_a_correct_recipe_passes(values: Values, world_size: int | None) -> None:
    check_recipe(recipe_from_dict(values), world_size=world_size)


def test_a_correct_recipe_passes_at_a_larger_layout(values: Values) -> None:
    values["student"]["parallel"] = {"tensor": 4, "pipeline": 4, "sequence": True}
    values["teachers"]["math"]["parallel"] = {"tensor": 2, "pipeline": 8}
    values["teachers"]["code"] |= {
        "parallel": {"context": 2, "tensor": 2}, "megatron": {"cp_comm_type": "a2a"}, "layer_spec": "te"
    }  # fmt: skip
    values["optimizer"] = {"micro_batch_tokens": 4096}
    values["evaluation"] = {"every": 2, "prompts": [{"path": values["data"]["train"][0]["path"], "label": "sql"}]}
    values["checkpoint"] = {"dir": values["run"]["dir"] + "/a/b"}
    check_recipe(recipe_from_dict(values), world_size=64)


def set_model(values: Values, role: str, **model: Any) -> None:
    """Change the config.json of a role's checkpoint."""
    section = values["student"] if role == "student" else values["teachers"][role]
    path = Path(section["checkpoint"]) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | model))


def _two_teachers_one_label(values: Values) -> None:
    values["teachers"]["code"]["labels"] = ["python", "math"]


def _label_claimed_twice(values: Values) -> None:
    values["teachers"]["code"]["labels"] = ["python", "sql", "python"]


def _source_label_without_teacher(values: Values) -> None:
    values["data"]["train"][0]["label"] = "maths"


def _teacher_name_is_no_label_when_it_has_labels(values: Values) -> None:
    values["evaluation"] = {"prompts": [{"path": values["data"]["train"][0]["path"], "label": "code"}]}


def _missing_prompts(values: Values) -> None:
    values["data"]["train"][1]["path"] = "nowhere.jsonl"


def _prompts_are_a_folder(values: Values) -> None:
    values["data"]["train"][1]["path"] = values["teachers"]["math"]["checkpoint"]


def _missing_checkpoint(values: Values) -> None:
    values["student"]["checkpoint"] = "no/such/folder"


def _checkpoint_is_a_file(values: Values) -> None:
    values["student"]["checkpoint"] = values["data"]["train"][0]["path"]


def _heads(values: Values) -> None:
    values["student"]["parallel"] = {"tensor": 3}


def _kv_heads(values: Values) -> None:
    values["teachers"]["math"]["parallel"] = {"tensor": 8}


def _sequence(values: Values) -> None:
    values["student"]["parallel"] = {"sequence": True}


def _stages(values: Values) -> None:
    values["student"]["parallel"] = {"pipeline": 5}


def _experts(values: Values) -> None:
    values["student"]["parallel"] = {"expert": 2}


def _experts_of_another_number(values: Values) -> None:
    set_model(values, "math", num_experts=6, moe_intermediate_size=64)
    values["teachers"]["math"]["parallel"] = {"expert": 4}


def _experts_in_the_newer_spelling(values: Values) -> None:
    set_model(values, "math", num_local_experts=6, moe_intermediate_size=64)
    values["teachers"]["math"]["parallel"] = {"expert": 4}


def _experts_split_unevenly(values: Values) -> None:
    set_model(values, "math", num_experts=6, moe_intermediate_size=33)
    values["teachers"]["math"]["parallel"] = {"tensor": 2}


def _experts_without_sequence_parallelism(values: Values) -> None:
    set_model(values, "student", num_experts=6, moe_intermediate_size=64)
    values["student"]["parallel"] = {"tensor": 2, "sequence": False}


def _positions(values: Values) -> None:
    set_model(values, "math", max_position_embeddings=1039)


def _evaluation_positions(values: Values) -> None:
    values["evaluation"] = {"max_new_tokens": 1025, "prompts": [{"path": values["data"]["train"][0]["path"]}]}


def _te_on_cpu(values: Values) -> None:
    values["run"]["device"] = "cpu"
    values["teachers"]["math"]["layer_spec"] = "te"


def _unknown_hook(values: Values) -> None:
    values["loss"] = {"hooks": [{"name": "filter"}, {"name": "reweigh"}]}


def _mini_batches(values: Values) -> None:
    values["optimizer"] = {"mini_batches": 5}


def _evaluation_without_prompts(values: Values) -> None:
    values["evaluation"] = {"every": 5}


def _system_prompt(values: Values) -> None:
    values["data"] |= {"system_prompt": "Be brief.", "chat_template": "off"}


def _run_dir_below_a_file(values: Values) -> None:
    values["run"]["dir"] = values["data"]["train"][0]["path"] + "/run"


def _checkpoint_dir_is_a_file(values: Values) -> None:
    values["checkpoint"] = {"dir": values["data"]["train"][0]["path"]}


def _communication_without_context(values: Values) -> None:
    values["student"]["megatron"] = {"cp_comm_type": "all_gather"}


def _communication_of_local_layers(values: Values) -> None:
    values["student"] |= {
        "megatron": {"cp_comm_type": "all_gather"}, "parallel": {"context": 2}, "layer_spec": "local"
    }  # fmt: skip


def _communication_by_heads(values: Values) -> None:
    values["teachers"]["code"] |= {"megatron": {"cp_comm_type": "a2a"}, "parallel": {"context": 4, "tensor": 2}}


def _hook_scope_without_rows(values: Values) -> None:
    values["optimizer"] = {"micro_batch_tokens": 100}
    values["loss"] = {"hooks": [{"name": "filter"}, {"name": "reweight", "scope": "microbatch"}]}


def _home_folder(values: Values) -> None:
    values["run"]["dir"] = "~/runs/a"


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (_two_teachers_one_label, "teachers.code.labels: 'math' is claimed by teachers.math as well; a label belongs"),
        (_label_claimed_twice, "teachers.code.labels: 'python' is claimed twice by it"),
        (_source_label_without_teacher, "data.train.0.label: no teacher takes 'maths'; did you mean math?"),
        (
            _teacher_name_is_no_label_when_it_has_labels,
            "evaluation.prompts.0.label: no teacher takes 'code'; the labels with a teacher are math, python, sql",
        ),
        (_missing_prompts, "data.train.1.path: nowhere.jsonl does not exist (looked in "),
        (_prompts_are_a_folder, "is a folder; give a file of prompts"),
        (_missing_checkpoint, "student.checkpoint: no/such/folder does not exist (looked in "),
        (_checkpoint_is_a_file, "is a file; give the folder of a converted checkpoint"),
        (
            _heads,
            (
                "student.parallel.tensor: 3 does not divide the model's 8 heads nor its 4 key/value heads nor its "
                "64 rows of the MLP; choose a number that divides 8 and 4 and 64"
            ),
        ),
        (_kv_heads, "teachers.math.parallel.tensor: 8 does not divide the model's 4 key/value heads; choose"),
        (_sequence, "student.parallel.sequence: true needs parallel.tensor above 1"),
        (_stages, "student.parallel.pipeline: 5 stages for a model of 4 layers; lower it"),
        (_experts, "student.parallel.expert: 2, but the model has no experts; leave it 1"),
        (_experts_of_another_number, "teachers.math.parallel.expert: 4 does not divide the model's 6 experts; choose"),
        (_experts_in_the_newer_spelling, "teachers.math.parallel.expert: 4 does not divide the model's 6 experts"),
        (_experts_split_unevenly, "teachers.math.parallel.tensor: 2 does not divide the model's 33 rows of the MLP"),
        (
            _experts_without_sequence_parallelism,
            "student.parallel.sequence: false, but experts train with parallel.tensor 2 only with sequence parallelism",
        ),
        (_positions, "rollout.max_new_tokens: 16 after prompts of up to 1024 tokens (data.max_prompt_tokens) exceeds"),
        (_evaluation_positions, "evaluation.max_new_tokens: 1025 after prompts"),
        (_te_on_cpu, "teachers.math.layer_spec: te needs CUDA and run.device is cpu; use auto or local"),
        (
            _unknown_hook,
            "loss.hooks.1.name: no hook is named 'reweigh'; did you mean reweight? Built in are filter, re",
        ),
        (_mini_batches, "optimizer.mini_batches: 5 updates from 4 answers a step"),
        (
            _evaluation_without_prompts,
            "evaluation.every: 5, but evaluation.prompts and evaluation.benchmarks name no file; give one",
        ),
        (_system_prompt, "data.system_prompt: needs a chat template and data.chat_template is off; use auto or on"),
        (_run_dir_below_a_file, "prompts.jsonl is a file; choose another folder"),
        (_checkpoint_dir_is_a_file, "checkpoint.dir: "),
        (
            _communication_without_context,
            "student.megatron.cp_comm_type: 'all_gather' has no effect, since student.parallel.context is 1; leave it",
        ),
        (_communication_of_local_layers, "'all_gather' is read by Transformer Engine's layers and student.layer_spec"),
        (
            _communication_by_heads,
            "teachers.code.megatron.cp_comm_type: 'a2a' shares out the model's 4 key/value heads over tensor 2 x "
            "context 4 = 8 ranks, which does not divide them; use 'p2p' or 'all_gather'",
        ),
        (
            _hook_scope_without_rows,
            "loss.hooks.1.scope: 'microbatch' takes its statistics over micro-batches of optimizer.micro_batch_size "
            "answers, and optimizer.micro_batch_tokens is 100; use 'global', or set micro_batch_size instead",
        ),
        (_home_folder, f"run.dir: ~/runs/a: ~ is not replaced here; write {os.path.expanduser('~/runs/a')}"),
    ],
)
def test_one_mistake_is_one_problem(values: Values, spoil: Callable[[Values], None], expected: str) -> None:
    spoil(values)
    message = complaint(values)
    assert expected in message and "problems" not in message


def test_a_whole_world_must_hold_copies_of_every_role(values: Values) -> None:
    values["student"]["parallel"] = {"tensor": 2, "pipeline": 2}
    values["teachers"]["math"]["parallel"] = {"context": 3}
    assert "tensor 1 x pipeline 1 x context 3 = 3 ranks a copy of the model" in complaint(values, world_size=4)
    values["teachers"]["math"]["parallel"] = {"context": 2}
    values["teachers"]["code"]["parallel"] = {"tensor": 1, "pipeline": 3}
    message = complaint(values, world_size=4)
    assert "teachers.code.parallel: tensor 1 x pipeline 3 x context 1 = 3 ranks a copy of the model" in message
    assert "does not divide the run's 4; start a multiple of 3 ranks or lower one of them" in message
    assert "student.parallel" in complaint(values, world_size=6)
    check_recipe(recipe_from_dict(values), world_size=12)
    check_recipe(recipe_from_dict(values), world_size=None)


def test_experts_are_spread_over_the_ranks_of_a_stage(values: Values) -> None:
    set_model(values, "student", num_experts=8, moe_intermediate_size=64)
    values["student"]["parallel"] = {"tensor": 2, "pipeline": 2, "expert": 4}
    message = complaint(values, world_size=8)
    assert (
        "student.parallel.expert: 4 does not divide the 2 ranks that share the experts of a pipeline stage" in message
    )
    check_recipe(recipe_from_dict(values), world_size=16)
    check_recipe(recipe_from_dict(values), world_size=None)


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
    assert "config.json is missing or is not a JSON object" in complaint(values)


def test_a_folder_of_checkpoints_names_the_newest(values: Values, tmp_path: Path, make_checkpoint: Make) -> None:
    for step in ("step_000010", "step_000020"):
        make_checkpoint(tmp_path / "run" / "checkpoints" / step)
    values["student"]["checkpoint"] = str(tmp_path / "run" / "checkpoints")
    assert complaint(values).endswith("give one of them, for example " + str(tmp_path / "run/checkpoints/step_000020"))


def test_a_hook_of_ones_own_needs_a_plugin(values: Values) -> None:
    values["loss"] = {"hooks": [{"name": "mine"}]}
    assert "a hook of your own needs its module in run.plugins" in complaint(values)
    values["run"]["plugins"] = ["my_hooks"]
    check_recipe(recipe_from_dict(values), world_size=None)


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


def test_all_problems_are_listed_together(values: Values) -> None:
    for spoil in (_two_teachers_one_label, _missing_prompts, _heads, _positions, _mini_batches):
        spoil(values)
    message = complaint(values, world_size=4)
    assert message.startswith("6 problems in the recipe:\n  - ")


def test_models_that_are_not_what_they_should_be_do_not_break_the_checks(values: Values) -> None:
    for model in ({}, {"num_attention_heads": "8", "vocab_size": None, "num_hidden_layers": -1}):
        path = Path(values["student"]["checkpoint"]) / "config.json"
        path.write_text(json.dumps(model))
        check_recipe(recipe_from_dict(values), world_size=2)


def test_every_check_is_exercised_alone(values: Values) -> None:
    recipe = recipe_from_dict(values)
    for check in CHECKS:
        assert list(check(Context(recipe, None, {}))) == [], check.__name__
