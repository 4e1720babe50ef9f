"""Every benchmark runs, at toy size and in this process: what it calls and what it reads of a run is there."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from tiny_run import make_inputs

from benchmarks import divergence, fp8_emulation, rollout, router, step
from benchmarks.fire_vs_opd import analyse, dropped, run

REPOSITORY = Path(__file__).parents[2]
MATH = REPOSITORY / "recipes" / "data" / "math.jsonl"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Converted student, math and code, and beside each its Hugging Face folder (``-hf``)."""
    return make_inputs(tmp_path_factory.mktemp("benchmarks"), num_hidden_layers=5)


@pytest.fixture
def printed(capsys):
    """Runs a benchmark, with several arguments a string; what it has printed, and its last line as JSON."""

    def call(main, *arguments):
        main([*(word for argument in arguments for word in str(argument).split()), "--toy"])
        out = capsys.readouterr().out
        return out, json.loads(out.splitlines()[-1])

    return call


def test_every_file_is_run_here():
    """One that is added needs a test of its own."""
    files = {path.relative_to(REPOSITORY / "benchmarks").as_posix() for path in REPOSITORY.glob("benchmarks/**/*.py")}
    parts = {"sides.py", "products.py", "rollout_side.py", "trl_distill.py"}
    parts |= {f"fire_vs_opd/{name}.py" for name in ("controls", "evaluate", "pretrain", "study", "tasks")}
    mains = {Path(m.__file__) for m in (divergence, fp8_emulation, rollout, router, step, analyse, dropped, run)}
    assert files == parts | {path.relative_to(REPOSITORY / "benchmarks").as_posix() for path in mains}


def test_rollout(models, printed):
    sizes = "--rows 3 --new-tokens 4 --batch-size 2 --repeats 1 --threads 1 --kinds equal --stop w7"
    out, (result,) = printed(
        rollout.main, "--hf", models / "math-hf", "--prompts", MATH, sizes, "--baseline", REPOSITORY
    )
    assert {*result["sides"]} == {"ours", "baseline", "transformers"}
    for name, side in result["sides"].items():
        assert side["tokens"] == 12 and side["lengths"] == [4, 4, 4], name
        assert side["tokens_per_second"] > 0 and side["peak_mb"] > 0
    assert sum(line.split()[1] == "equal" for line in out.splitlines()[1:-1]) == 3


def test_step(models, printed):
    folders = ("--student", models / "student-hf", "--teacher", models / "math-hf", "--prompts", MATH)
    sizes = "--rollouts 2 --new-tokens 4 --micro-batch-size 1 --steps 2 --threads 1"
    out, sides = printed(step.main, *folders, sizes, "--peer-python", sys.executable)
    if importlib.util.find_spec("trl") is None:
        assert f"no comparison with TRL: {sys.executable} has no trl" in out
        assert {*sides} == {"ours", "ours, FiRe", "products"}
    else:
        assert {*sides} == {"trl 1.16", "trl, micro", "ours", "ours, FiRe", "products"}
    assert sides["ours"]["tokens"] == 8
    assert all(sides["ours"][f"{phase}_s"] > 0 for phase in sides["products"]) and min(sides["products"].values()) > 0


def test_router(models, printed):
    sizes = "--rounds 1 --steps 2 --rollouts 4 --new-tokens 4"
    _, ways = printed(router.main, "--models", models, sizes)
    assert {*ways} == {*router.WAYS}
    for way, values in ways.items():
        assert all(value > 0 for name, value in values.items() if name != "router"), way


def test_divergence(printed):
    out, result = printed(divergence.main, "--tokens", 70, "--rounds", 1, "--threads", 1, "--dtypes", "float32")
    assert "no comparison with TRL: no --peer-python with trl is given" in out
    assert result["ours"]["value"] == pytest.approx(result["full logits"]["value"], rel=1e-5)


def test_fp8_emulation(models, capsys):
    sizes = {"--steps": 1, "--prompts": 4, "--new-tokens": 4, "--students": "student", "--ways": "tensorwise"}
    flags = [str(part) for pair in sizes.items() for part in pair]
    fp8_emulation.main(["--models", str(models), *flags, "--runs", "--toy"])
    lines = capsys.readouterr().out.splitlines()
    for way in ("bfloat16", "float32", *fp8_emulation.FP8):
        numbers = next(line for line in lines if line.startswith(f"{way:20}")).removeprefix(way).split()
        assert len(numbers) == 9 and (float(numbers[2]) > 0) == (way != "bfloat16"), "log-probabilities have moved"
    started = next(place for place, line in enumerate(lines) if line.startswith("Runs: "))
    assert [line[:20].strip() for line in lines[started + 2 :]] == [
        "bfloat16",
        "tensorwise hybrid",
        "tensorwise, 2 ends",
    ]


def test_the_study(tmp_path, capsys):
    """Models, runs, results, and what is said of them."""
    arms = ("opd", "filter", "reweight", "fire", "random")
    run.main(["--out", str(tmp_path), "--seeds", "1", "--arms", *arms, "--toy"])
    results = {path.stem for path in (tmp_path / "results").iterdir()}
    assert results == {"math", "code", "student_0", *(f"{arm}_0" for arm in arms)}
    analyse.main(["--out", str(tmp_path), "--to", str(tmp_path / "tables")])
    assert {path.name for path in (tmp_path / "tables").iterdir()} >= {"results.csv", "table.md"}
    dropped.main(["--out", str(tmp_path)])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| math |", "| code |"))]
    assert len(rows) == 2 and all("%" in row for row in rows)
