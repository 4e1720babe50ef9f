"""Bad input on two ranks: every rank leaves with exit code 2 and none hangs, also when only one sees the problem."""

from __future__ import annotations

import json
from pathlib import Path
from subprocess import STDOUT

from processes import call, free_ports
from tiny_run import tiny_recipe, write_recipe

from fire_megatron.checkpoint.steps import saved_steps

CASES = (
    ("recipe", 1, "absent.yaml: no such recipe file"),
    ("recipe", 0, "absent.yaml: no such recipe file"),
    ("plugin", 1, "2 problems in the recipe:\n  - loss.hooks.0.name: no hook is named 'filter'"),
    ("prompts", 1, "rank-local: prompts"),
    ("files", 1, "rank-local: files"),
    ("chunk", 1, "rank-local: chunk"),
    ("run folder", 0, "rank-local: run folder"),
    ("disk", 1, "cannot be written"),
    ("layout", None, "student.parallel.tensor: 3 does not divide the model's 4 heads nor its 2 key/value heads"),
)
"""What is spoilt, on which rank or for all, and what the run says."""


def test_one_rank_sees_the_problem_or_all_do(tiny, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_recipe(tiny, tmp_path / "run", run__steps=1))
    cases = []
    for number, ((spoilt, rank, _), port) in enumerate(zip(CASES, free_ports(len(CASES)), strict=True)):
        arguments = ["--recipe", str(recipe), f"run.dir={tmp_path / f'run{number}'}"]
        arguments += ["student.parallel.tensor=3"] if spoilt == "layout" else []
        cases.append({"spoilt": spoilt, "rank": rank, "port": port, "arguments": arguments})
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    output = call(Path(__file__).with_name("rank_driver.py"), tmp_path / "cases.json", ranks=2, code=1, stderr=STDOUT)
    assert "exitcode  : 2" in output
    assert "Traceback" not in output.split("torch/distributed/elastic")[0], output
    results = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for number, (case, main_rank, other) in enumerate(zip(CASES, *results, strict=True)):
        assert main_rank["code"] == other["code"] == 2, case
        assert main_rank["errors"].startswith("error: ") and main_rank["errors"].count(case[2]) == 1, case
        assert other["errors"] == "", "one rank speaks for all"
        assert max(main_rank["seconds"], other["seconds"]) < 20, case
        assert saved_steps(tmp_path / f"run{number}" / "checkpoints") == []
