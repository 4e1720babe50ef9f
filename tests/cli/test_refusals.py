"""Mistakes that the command line, the recipe or a config.json tell are told before torch is imported."""

from __future__ import annotations

import json
from subprocess import STDOUT

import pytest
from models import save_hf
from processes import call, environment
from tiny_run import tiny_recipe, write_prompts, write_recipe

HUB = "a model of the Hugging Face hub has to be downloaded first: hf download Qwen/Qwen3-1.7B --local-dir Qwen3-1.7B"
MODEL_TYPE = "model_type is 'gpt2'; supported:"
CASES = {
    "convert a name of the hub": (("convert", "hf-to-megatron", "--hf", "Qwen/Qwen3-1.7B", "--out", "out"), HUB),
    "evaluate a name of the hub": (("evaluate", "--hf", "Qwen/Qwen3-1.7B", "--benchmark", "math.jsonl"), HUB),
    "train a name of the hub": (("train", "--recipe", "r.yaml", "student.checkpoint=Qwen/Qwen3-1.7B"), HUB),
    "plan a name of the hub": (("plan", "r.yaml", "--world-size", "2", "student.checkpoint=Qwen/Qwen3-1.7B"), HUB),
    "convert another architecture": (("convert", "hf-to-megatron", "--hf", "gpt2", "--out", "out"), MODEL_TYPE),
    "evaluate another architecture": (("evaluate", "--hf", "gpt2", "--benchmark", "math.jsonl"), MODEL_TYPE),
    "evaluate in an impossible layout": (
        ("evaluate", "--hf", "qwen3", "--benchmark", "math.jsonl", "--tensor", "3"),
        "--tensor: 3 does not divide",
    ),
    "export what is no checkpoint": (
        ("convert", "megatron-to-hf", "--checkpoint", "qwen3", "--out", "out"),
        "qwen3 is a Hugging Face folder and must be converted first",
    ),
    "convert onto something else": (
        ("convert", "hf-to-megatron", "--hf", "qwen3", "--out", "gpt2"),
        "gpt2: exists and is not a converted checkpoint",
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with models, prompts and a recipe, and a torch that cannot be imported."""
    folder = tmp_path_factory.mktemp("refusals")
    save_hf("qwen3", folder / "qwen3", num_hidden_layers=2)
    (folder / "gpt2").mkdir()
    (folder / "gpt2" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    write_prompts(folder / "math.jsonl", "math", 3)
    write_recipe(folder / "r.yaml", tiny_recipe(folder, folder / "run"))
    (folder / "without").mkdir()
    (folder / "without" / "torch.py").write_text("raise AssertionError('torch is imported')")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_without_torch(place, case):
    words, expected = CASES[case]
    options = {"cwd": place, "env": environment(place / "without"), "stderr": STDOUT}
    told = call("-m", "fire_megatron", *words, code=2, **options)
    assert told.startswith("error: ") and expected in told and "Traceback" not in told
