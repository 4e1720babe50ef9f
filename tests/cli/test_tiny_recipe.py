"""The recipe of Qwen3-4B with two Qwen3-30B-A3B teachers, run in small: the same map, tiny random models, 4 ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import make_tiny
import pytest
from processes import ROOT, call, free_ports
from tiny_run import read_metrics
from transformers import AutoModelForCausalLM, AutoTokenizer

from fire_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf
from fire_megatron.checkpoint.steps import find_latest
from fire_megatron.config.load import load_recipe
from fire_megatron.config.roles import roles
from fire_megatron.config.spans import parse_span

RECIPES = {32: ROOT / "recipes" / "qwen3_math_code.yaml", 4: ROOT / "recipes" / "qwen3_math_code_tiny.yaml"}


def shares(world_size):
    """Share of the ranks that each role has."""
    spans = {key: parse_span(role.ranks, world_size) for key, role in roles(load_recipe(RECIPES[world_size])).items()}
    return {key: (span.first / world_size, span.count / world_size) for key, span in spans.items()}


def test_the_maps_are_the_same():
    large, small = (load_recipe(path) for path in RECIPES.values())
    assert shares(32) == shares(4)
    assert large.loss == small.loss and large.student.parallel == small.student.parallel
    assert large.student.megatron == small.student.megatron


ROLES = {"student": "student", "teachers.math": "math", "teachers.code": "code"}
TEACHERS = ("teachers.math", "teachers.code")
LAYOUTS = {
    "as shipped": ([], ["student on ranks 0-1 (tensor 2)", "math on rank 2\n", "code on rank 3\n"]),
    "teachers share two ranks and split their experts": (
        [f"{key}.{change}" for key in TEACHERS for change in ("ranks=2-3", "parallel.expert=2", "offload=true")]
        + ["rollout.group_size=1"],
        ["student on ranks 0-1 (tensor 2)", "math on ranks 2-3 (expert 2", "code on ranks 2-3 (expert 2"],
    ),
    "all on all ranks, and in turn": (
        [f"{key}.{change}" for key in ROLES for change in ("ranks=null", "offload=true")],
        ["student on ranks 0-3 (tensor 2, data 2)", "math on ranks 0-3 (data 4)", "code on ranks 0-3 (data 4)"],
    ),
}
"""Overrides, and what the run says of who is where."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of each layout's run and what it printed, of the first one stopped after step 2 and continued: all in one
    launch."""
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_tiny.py", "--out", str(folder / "hf")])
        make_tiny.main()
    for name in ROLES.values():
        hf_to_megatron(folder / "hf" / name, folder / name)
    common = [
        "--recipe",
        str(RECIPES[4]),
        "rollout.max_new_tokens=8",
        *(f"{key}.checkpoint={folder / name}" for key, name in ROLES.items()),
    ]
    arguments = [[*common, f"run.dir={folder / name}", *changes] for name, (changes, _) in LAYOUTS.items()]
    arguments.insert(0, [*arguments[0], "run.steps=2"])
    ports = free_ports(len(arguments))
    cases = [{"arguments": each, "port": port} for each, port in zip(arguments, ports, strict=True)]
    (folder / "cases.json").write_text(json.dumps(cases))
    call(Path(__file__).with_name("rank_driver.py"), folder / "cases.json", ranks=4)
    said = [case["output"] for case in json.loads((folder / "rank0.json").read_text())[1:]]
    return {name: (folder / name, text) for name, text in zip(LAYOUTS, said, strict=True)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_runs_resumes_and_is_exported(runs, tmp_path, layout):
    run_dir, said = runs[layout]
    assert all(place in said for place in LAYOUTS[layout][1]), said
    assert ("after step 2" in said) == (layout == "as shipped")
    assert "reverse KL before" in said
    metrics = [line for line in read_metrics(run_dir) if "loss" in line]
    assert [line["step"] for line in metrics] == [1, 2, 3]
    for line in metrics:
        assert line["router/bytes"] > 0
        assert line["teacher/math/rows"] + line["teacher/code/rows"] == 16
    exported = megatron_to_hf(find_latest(run_dir / "checkpoints"), tmp_path / "exported")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    prompt = json.loads((ROOT / "recipes" / "data" / "math.jsonl").read_text().splitlines()[0])["problem"]
    assert tokenizer.decode(tokenizer(prompt).input_ids) == prompt
    assert model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=3).shape[0] == 1
