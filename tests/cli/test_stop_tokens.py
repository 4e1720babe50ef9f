"""Where a chat template, a teacher and the student end answers with different tokens, commands say so, and the fix."""

from __future__ import annotations

import json
import shutil

import pytest
from boxed_models import make_model, write_benchmark
from tiny_run import tiny_recipe, write_recipe

from fire_megatron.cli import evaluate, train

TEMPLATE = "{% for m in messages %}{{ 'w8 ' + m['content'] + ' <|im_end|> ' }}{% endfor %}"
NAMES = 'add ["<|im_end|>"] to {}'


def give_template(folder):
    """Make a token of the vocabulary one that ends the turns of a chat."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    index = tokenizer["model"]["vocab"].pop("w9")
    tokenizer["model"]["vocab"]["<|im_end|>"] = index
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    tokenizer["added_tokens"].append({"id": index, "content": "<|im_end|>", "special": True, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return index


@pytest.fixture
def chatty(tiny, tmp_path):
    """A recipe whose models have a template, and the id of the token that ends its turns."""
    values = tiny_recipe(tiny, tmp_path / "run")
    for name, role in (("student", values["student"]), *values["teachers"].items()):
        shutil.copytree(tiny / name, tmp_path / name)
        role["checkpoint"], index = str(tmp_path / name), give_template(tmp_path / name)
    return values, index


@pytest.mark.parametrize(
    ("changes", "teacher", "named"),
    [
        ({}, False, "the chat template: <|im_end|>"),
        ({}, True, "teachers.math: <|im_end|>; the chat template: <|im_end|>"),
        ({"data": "off"}, True, "teachers.math: <|im_end|>"),
        ({"data": "off"}, False, None),
        ({"rollout": ["<|im_end|>"]}, True, None),
    ],
    ids=["template", "teacher and template", "teacher", "none", "told"],
)
def test_check_names_them(chatty, tmp_path, capfd, changes, teacher, named):
    values, index = chatty
    if teacher:  # an instructed teacher of a base student
        ends = json.dumps({"eos_token_id": [index, 5]})
        (tmp_path / "math" / "generation_config.json").write_text(ends)
    if "data" in changes:
        values["data"]["chat_template"] = changes["data"]
    values["rollout"]["stop_tokens"] = changes.get("rollout", [])
    recipe = write_recipe(tmp_path / "recipe.yaml", values)
    assert train.main(["--recipe", str(recipe), "--check"]) == 0
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("WARNING: answers do not end")]
    assert len(said) == (named is not None)
    if named:
        assert f"({named})" in said[0] and said[0].endswith(NAMES.format("rollout.stop_tokens"))


def test_evaluation_names_the_template(tmp_path, capfd):
    make_model(tmp_path / "model")
    write_benchmark(tmp_path / "sums.jsonl", 1)
    give_template(tmp_path / "model")
    fixed = f"--checkpoint {tmp_path}/model --benchmark {tmp_path}/sums.jsonl --max-new-tokens 2 --device cpu".split()
    for options in ([], ["--stop-token", "<|im_end|>"]):
        assert evaluate.main([*fixed, "--out", str(tmp_path / f"out{len(options)}"), *options]) == 0
        assert (NAMES.format("--stop-token") in capfd.readouterr().out) == (not options)
