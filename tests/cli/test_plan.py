"""``fire-megatron plan``, as a user sees it. What it says of a rank is compared with a real run in
tests/distributed/test_plan.py."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import plan_cli
import pytest
from processes import ROOT, call
from tiny_run import make_inputs, tiny_recipe, write_recipe

QWEN = ("student.checkpoint=x/Qwen3-4B", "teachers.math.checkpoint=x/Qwen3-4B", "teachers.code.checkpoint=x/Qwen3-4B")
BIG = (*QWEN, "student.precision.dtype=bf16", "data.max_prompt_tokens=512", "rollout.max_new_tokens=512")
NINE = ("student.checkpoint=x/nine", "student.parallel.tensor=2", "optimizer.micro_batch_size=2", "--models", "{made}")
MODELS = ("--models", str(ROOT / "recipes" / "models"))

CALLS = {
    "tiny": ["--world-size", "4", "--json"],
    "people": ["--world-size", "4", "--gpu", "h100", "student.parallel.pipeline=2"],
    "heads": ["--world-size", "6", "student.parallel.tensor=3"],
    "ranks": ["--world-size", "6", "student.parallel.tensor=2", "student.parallel.pipeline=2"],
    "gpu": ["--world-size", "4", "--gpu", "h1000"],
    "no ranks": ["--world-size", "0"],
    "mxfp8": ["--world-size", "4", "--gpu", "h100", "run.device=auto", "student.precision.fp8.recipe=mxfp8",
              "student.precision.dtype=bf16"],
    "missing": ["--world-size", "4", "student.checkpoint=nowhere/Qwen3-4B"],
    "elsewhere": ["--world-size", "1024", "--json", "--gpu", "h100", *MODELS, *BIG, "run.device=auto",
                  "student.parallel.tensor=4", "student.parallel.pipeline=4"],
    "few": ["--world-size", "4", "--json", *NINE],
    "whole": ["--whole", "--world-size", "4", "--json", *NINE],
    "advised": ["--advised", "--world-size", "2", "--json", "--gpu", "h100", *MODELS, *BIG, "run.device=auto",
                "optimizer.micro_batch_size=8", "rollout.prompts_per_step=16"],
    "too long": ["--world-size", "4", "--response-tokens", "7"],
    "hooks": ["--world-size", "4", "student.checkpoint=x/nine", "--models", "{made}", "run.plugins=[nowhere]"],
}  # fmt: skip


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What each call answers."""
    inputs = make_inputs(tmp_path_factory.mktemp("plan"))
    recipe = write_recipe(inputs / "recipe.yaml", tiny_recipe(inputs, inputs / "run"))
    (inputs / "nine").mkdir()
    shape = json.loads((inputs / "student" / "config.json").read_text()) | {"num_hidden_layers": 9, "layer_types": None}
    (inputs / "nine" / "config.json").write_text(json.dumps(shape))
    calls = [[part.format(made=inputs) for part in each] for each in CALLS.values()]
    first = [each[0] in ("--whole", "--advised") for each in calls]
    calls = [[*each[:n], str(recipe), *each[n:]] for each, n in zip(calls, first, strict=True)]
    found = json.loads(call(plan_cli.__file__, read=json.dumps(calls), timeout=600))
    assert not (inputs / "run").exists(), "a plan writes nothing"
    return dict(zip(CALLS, found, strict=True))


def test_json_has_every_rank_once(answers):
    assert answers["tiny"]["code"] == 0
    plan = json.loads(answers["tiny"]["out"])
    assert [kind["ranks"] for kind in plan["kinds"]] == ["0-3"]
    assert set(plan["kinds"][0]["roles"]) == {"student", "teachers.math", "teachers.code"}
    assert list(plan["kinds"][0]["phases"]) == ["sampling", "scoring code", "scoring math", "exchange", "update"]
    assert plan["workload"]["shares"] == {"math": 0.5, "code": 0.5}, "of the prompt files"
    assert plan["seconds"] is None and plan["fits"]


def test_text_says_what_it_rests_on(answers):
    text = answers["people"]["out"]
    assert answers["people"]["code"] == 0
    for words in ("Ranks 0-1 (2)", "Ranks 2-3 (2)", "Fits, with", "pipeline's bubble", "Assumptions", "prompts (code"):
        assert words in text, text


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("heads", ["student.parallel.tensor: 3", "does not divide"]),
        ("ranks", ["student.parallel", "does not divide the run's 6"]),
        ("gpu", ["h1000", "h100, h200"]),
        ("no ranks", ["--world-size 0"]),
        ("mxfp8", ["student.precision.fp8.recipe", "Blackwell"]),
        ("too long", ["--response-tokens: 7", "rollout.max_new_tokens"]),
        ("hooks", ["run.plugins", "nowhere"]),
        ("missing", ["student.checkpoint", "nowhere/Qwen3-4B does not exist"]),
    ],
)
def test_mistakes(answers, call, words):
    assert answers[call]["code"] == 2, answers[call]
    for part in words:
        assert part in answers[call]["err"]


def test_a_world_of_1024_on_another_machine(answers):
    assert answers["elsewhere"]["code"] == 0, answers["elsewhere"]
    plan = json.loads(answers["elsewhere"]["out"])
    assert [kind["count"] for kind in plan["kinds"]] == [256] * 4
    assert sum("not on this machine" in note for note in plan["notes"]) == 3
    layers = 36 // 4 * (2560 * (4096 + 2 * 1024 + 4096 + 3 * 9728) // 4 + 2 * 2560 + 2 * 128)
    first, middle = (plan["kinds"][i]["roles"]["student"]["parameters"] for i in (0, 1))
    assert middle == layers
    assert first == layers + 151936 // 4 * 2560, "and the embedding"
    assert plan["seconds"]["total"] > 0


def test_a_few_layers_and_rows_tell_the_rest(answers):
    assert (answers["few"]["code"], answers["whole"]["code"]) == (0, 0), answers["few"]["err"] + answers["whole"]["err"]
    few, whole = (json.loads(answers[name]["out"]) for name in ("few", "whole"))
    for some, every in zip(few["kinds"], whole["kinds"], strict=True):
        for name, phase in every["phases"].items():
            assert some["phases"][name]["collectives"] == phase["collectives"], name
            assert some["phases"][name]["flops"] == phase["flops"], name
            assert some["phases"][name]["moving_bytes"] == pytest.approx(phase["moving_bytes"], rel=0.02), name


def test_what_does_not_fit_and_what_helps(answers):
    first = answers["advised"]["first"]
    plan = json.loads(first["out"])
    assert first["code"] == 4 and not plan["fits"]
    assert plan["advice"], "something helps"
    assert plan["advice"][-1]["fits"]
    assert answers["advised"]["code"] == 0, "the advice, taken"


def test_the_command_is_installed_under_its_name():
    command = shutil.which("fire-megatron", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("fire-megatron is not installed in this environment (pip install -e .)")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "plan" in done.stdout and "train" in done.stdout
