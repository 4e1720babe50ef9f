"""The recipe of Qwen3-4B with two Qwen3-30B-A3B teachers, run in small: the same map, tiny random models, 4 ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import read_metrics
from transformers import AutoModelForCausalLM, AutoTokenizer

from fire_megatron.checkpoint.steps import find_latest
from fire_megatron.config.load import load_recipe
from fire_megatron.config.roles import roles
from fire_megatron.config.spans import parse_span

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {32: ROOT / "recipes" / "qwen3_math_code.yaml", 4: ROOT / "recipes" / "qwen3_math_code_tiny.yaml"}


def run(*command):
    """A command of the README's; its output."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, text=True, capture_output=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The models of ``make tiny``."""
    folder = tmp_path_factory.mktemp("tiny")
    run("tools/make_tiny.py", "--out", str(folder / "hf"))
    for name in ("student", "math", "code"):
        run("tools/convert.py", "hf-to-megatron", "--hf", str(folder / "hf" / name), "--out", str(folder / name))
    return folder


def shares(world_size):
    """Share of the ranks that each role has."""
    spans = {key: parse_span(role.ranks, world_size) for key, role in roles(load_recipe(RECIPES[world_size])).items()}
    return {key: (span.first / world_size, span.count / world_size) for key, span in spans.items()}


def test_the_maps_are_the_same():
    large, small = (load_recipe(path) for path in RECIPES.values())
    assert shares(32) == shares(4)
    assert large.loss == small.loss and large.student.parallel == small.student.parallel
    assert large.student.megatron == small.student.megatron


LAYOUTS = {
    "as shipped": [],
    "teachers share two ranks and split their experts": [
        *(f"teachers.{name}.ranks=2-3" for name in ("math", "code")),
        *(f"teachers.{name}.parallel.expert=2" for name in ("math", "code")),
        *(f"teachers.{name}.offload=true" for name in ("math", "code")),
        "rollout.group_size=1",
    ],
    "all on all ranks, and in turn": [
        *(f"{role}.ranks=null" for role in ("student", "teachers.math", "teachers.code")),
        *(f"{role}.offload=true" for role in ("student", "teachers.math", "teachers.code")),
    ],
}


PLACES = dict(
    zip(
        LAYOUTS,
        (
            ["student on ranks 0-1 (tensor 2)", "math on rank 2\n", "code on rank 3\n"],
            ["student on ranks 0-1 (tensor 2)", "math on ranks 2-3 (expert 2", "code on ranks 2-3 (expert 2"],
            ["student on ranks 0-3 (tensor 2, data 2)", "math on ranks 0-3 (data 4)", "code on ranks 0-3 (data 4)"],
        ),
        strict=True,
    )
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_runs_resumes_and_is_exported(checkpoints, tmp_path, layout):
    overrides = [f"{key}.checkpoint={checkpoints / name}" for key, name in (
        ("student", "student"), ("teachers.math", "math"), ("teachers.code", "code"))]  # fmt: skip
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m", "fire_megatron.train"]
    command = [*launch, "--recipe", str(RECIPES[4]), f"run.dir={tmp_path}", *overrides, *LAYOUTS[layout]]
    resumed = layout == next(iter(LAYOUTS))
    said = run(*command, *(["run.steps=2"] if resumed else []))
    assert all(place in said for place in PLACES[layout]), said
    if resumed:
        said = run(*command)
        assert "after step 2" in said
    assert "reverse KL before" in said
    metrics = [line for line in read_metrics(tmp_path) if line["step"]]
    assert [line["step"] for line in metrics] == [1, 2, 3]
    for line in metrics:
        assert line["router/bytes"] > 0
        assert line["teacher/math/rows"] + line["teacher/code/rows"] == 16
    exported = tmp_path / "exported"
    run("tools/convert.py", "megatron-to-hf", "--checkpoint", str(find_latest(tmp_path / "checkpoints")), "--out",
        str(exported))  # fmt: skip
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    prompt = json.loads((ROOT / "recipes" / "data" / "math.jsonl").read_text().splitlines()[0])["problem"]
    assert tokenizer.decode(tokenizer(prompt).input_ids) == prompt
    assert model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=3).shape[0] == 1
