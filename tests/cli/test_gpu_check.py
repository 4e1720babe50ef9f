"""tools/gpu_check.py on a CPU: all of it once, its budget, and what one check's end does to the others."""

import contextlib
import dataclasses
import importlib.util
import json
import signal
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from gpu_checks.check import FAILED, LEFT_OUT, NEEDS_GPU, OK, Check, Context, Findings, Result
from gpu_checks.runner import Runner, chosen
from gpu_checks.table import CHECKS
from gpu_checks.worker import work
from gpu_checks.workers import TIMED_OUT, Workers
from processes import call

from fire_megatron.platform.device import Device

TOOL = Path(__file__).resolve().parents[2] / "tools" / "gpu_check.py"


def gpu_check(out, *arguments, code):
    """Lines printed, results by check, and what they were found on."""
    printed = call(TOOL, "--device", "cpu", "--out", out, *arguments, code=code, timeout=230)
    results = json.loads((out / "results.json").read_text())
    return printed.splitlines(), {r["check"]: r for r in results["checks"]}, results["about"]


def test_every_check_runs_and_says_what_it_promises(tmp_path):
    """But for one that gets no time, which changes nothing for the others."""
    late = "transformers_256"
    options = ("--seconds", 220, "--limit", f"{late}=0.05", "--commit", "abc")
    lines, results, about = gpu_check(tmp_path, *options, code=1)
    assert list(results) == [check.name for check in CHECKS]
    for check in CHECKS:
        result, line = results[check.name], next(line for line in lines if f"  {check.name}: " in line)
        assert line.startswith(result["state"])
        if check.gpu:
            assert result["state"] == NEEDS_GPU
        elif check.name == late:
            assert result["state"] == FAILED and "time limit" in result["told"]
        elif check.name == "step_against_trl" and result["state"] == LEFT_OUT:
            assert result["told"] == "not installed: trl"
        else:
            assert result["state"] == OK, (tmp_path / "log.txt").read_text()[-6000:]
            assert set(check.figures) <= set(result["figures"])
    assert about["commit"] == "abc" and about["card"] == "cpu" and about["torch"] and "gpu_check.py" in about["command"]
    table = (tmp_path / "results.md").read_text()
    assert all(f"| {check.name} | {results[check.name]['state']} |" in table for check in CHECKS)
    agreement = results["agreement"]["figures"]
    assert 0 < agreement["engine_from_float32_mean"] < 0.05, "bfloat16 was not compared with float32"
    assert 0 < agreement["output_layer_max"] < 1e-4
    assert results["resume"]["figures"]["steps"] == results["whole_run"]["figures"]["steps"] + 1
    assert results["planned"]["figures"]["decode_32_seconds"] > 0


def test_without_time_every_check_is_left_out_and_says_so(tmp_path):
    _, results, _ = gpu_check(tmp_path, "--seconds", 0, "--only", "resume", "--only", "decode", code=0)
    assert list(results) == ["models", "whole_run", "resume", "decode_32", "decode_256"]
    assert {r["state"] for r in results.values()} == {LEFT_OUT}
    assert "no time: 0 s left" in results["models"]["told"]
    assert results["resume"]["told"] == "needs whole_run, which did not pass"


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        (["card"], ["card"]),
        (["export"], ["models", "whole_run", "resume", "export"]),
        (["fused_loss"], ["fused_loss_sampled", "fused_loss_full"]),
        ([], [check.name for check in CHECKS]),
    ],
)
def test_a_chosen_check_brings_what_it_needs(only, expected):
    assert [check.name for check in chosen(CHECKS, only)] == expected


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="--only cart: no check has that name"):
        chosen(CHECKS, ["cart"])


def test_the_default_budget_reaches_what_a_plan_is_held_against():
    """Going by the guesses, after a minute for imports."""
    names = [check.name for check in CHECKS]
    spent = [sum(check.seconds for check in CHECKS[: place + 1]) for place in range(len(CHECKS))]
    assert all(60 + spent[names.index(name)] < 480 for name in ("gpu_tests_products_on_gpu", "planned"))


@pytest.mark.parametrize(
    "name",
    [
        "card", "agreement", "decode_32", "training_step", "fused_loss_sampled", "offload", "transformers_32",
        "step_against_trl",
    ],
)  # fmt: skip
def test_what_measures_starts_as_a_run_does(monkeypatch, tmp_path, name):
    """With its settings of the allocator and of attention, and before a GPU is used."""

    def start(device, **_):
        raise RuntimeError("started first")

    monkeypatch.setattr("gpu_checks.models.start", start)
    monkeypatch.setattr("gpu_checks.peers.need", lambda *packages: None)
    result = work(next(check for check in CHECKS if check.name == name), Context("cpu", str(tmp_path), str(tmp_path)))
    assert result.told == "RuntimeError: started first"


@pytest.mark.parametrize(
    ("name", "module"), [("gpu_tests_on_gpu", "pytest"), ("step_against_trl", "trl"), ("export", "transformers")]
)
def test_what_is_not_installed_is_named_and_nothing_has_failed(monkeypatch, tmp_path, name, module):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda each: None if each == module else real(each))
    check = next(check for check in CHECKS if check.name == name)
    result = work(check, Context("cpu", str(tmp_path), str(tmp_path)))
    assert result.state == LEFT_OUT and f"not installed: {module}" in result.told


def test_without_transformer_engine_one_line_says_so_and_runs_go_on(monkeypatch, tmp_path):
    """It works on a GPU only, so here it is as if it were absent; float8 then has nothing to run on."""
    from gpu_checks import commands

    monkeypatch.setattr("fire_megatron.platform.device.select_device", lambda setting: Device("cpu"))
    context = Context("cuda", str(tmp_path), str(tmp_path))
    check = next(check for check in CHECKS if check.name == "transformer_engine")
    result = work(check, context)
    assert result.state == LEFT_OUT and "layer spec 'local'" in result.told
    assert work(next(check for check in CHECKS if check.name == "fp8"), context).state == LEFT_OUT
    recipe = commands.recipe(context, "any")
    assert "layer_spec" not in recipe["student"], "auto, which is Transformer Engine only where it works"


def test_sides_are_judged_by_one_another_and_by_what_bfloat16_rounds():
    from gpu_checks.agreement import PAIRS, SIDES, _problems

    figures = {"output_layer_max": 1e-5}
    figures |= {f"{side}_from_float32_mean": 0.2 for side in SIDES} | {f"{pair}_mean": 0.28 for pair in PAIRS}
    assert _problems(figures) == [], "layers that round a lot are no mistake of ours"
    figures |= {"engine_from_float32_mean": 1.5, "engine_from_trainer_mean": 1.4, "engine_from_teacher_mean": 1.4}
    problems = _problems(figures)
    assert (
        len(problems) == 2 and "engine_from_trainer: 1.4 nats apart on average, where bfloat16 explains 0.2" in problems
    )
    assert "output layer" in _problems(figures | {"output_layer_max": 0.1})[0]


def test_generations_that_are_timed_keep_what_a_run_keeps(monkeypatch):
    """Memory and graphs, and those of one number of tokens at a time."""
    from gpu_checks import decode

    made = []

    class Engine:
        def __init__(self, model, grid, *, keep_cache):
            assert keep_cache

        def release(self):
            made.append("released")

        def generate(self, prompts, rows, *, sampling, step):
            assert len(prompts) == 4
            made.append(sampling.max_new_tokens)

    monkeypatch.setattr(decode, "MegatronEngine", Engine)
    generate = decode._Generation(SimpleNamespace(context=Context("cpu", "", ""), grid=None), None, 4)
    for tokens in (8, 8, 8, 1, 1):
        generate(tokens)
    assert made == ["released", 8, 8, 8, "released", 1, 1]


def test_the_table_is_sound():
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    for place, check in enumerate(CHECKS):
        assert set(check.needs) <= set(names[:place]), f"{check.name} comes before what it needs"
        assert check.figures and check.seconds > 0
    tests = {path.name for path in (TOOL.parents[1] / "tests" / "gpu").glob("test_*.py")}
    assert tests <= {check.options.get("file") for check in CHECKS}, "a file of GPU tests is not in the table"


# ---- the runner, with processes that are pretended -------------------------------------------------------------------


class Pretended:
    """Workers whose processes end as told: an exit code without a result, or a result."""

    def __init__(self, context, log, ends):
        self._context, self.log, self._ends = context, log, ends
        self.limits = {}

    def start(self, limit):
        return True

    def run(self, name, limit):
        self.limits[name] = limit
        end = self._ends.get(name, OK)
        if isinstance(end, int):
            return end
        self._context.leave(Result(name, end, 1.0, "told", {"a": 1}))
        return 0

    def close(self):
        pass


def run(tmp_path, ends, *, seconds=100.0, **changes):
    context = Context("cuda", str(tmp_path), str(tmp_path))
    (tmp_path / "log.txt").write_text("before\nout of memory\n")
    checks = [
        Check(name, "nowhere:nothing", ("a",), 10, needs=needs)
        for name, needs in {"first": (), "second": ("first",), "third": ()}.items()
    ]
    workers = Pretended(context, tmp_path / "log.txt", ends)
    said = []
    runner = Runner(checks, context, workers, seconds=seconds, out=tmp_path, about={"command": ""}, say=said.append)
    passed = runner.run()
    return passed, {result.check: result for result in runner.results}, workers, said


def test_a_crash_does_not_end_the_others(tmp_path):
    passed, results, _, said = run(tmp_path, {"first": -11})
    assert not passed and len(said) == 3
    assert results["first"].state == FAILED
    assert "segmentation fault" in results["first"].told and "out of memory" in results["first"].told
    assert results["second"].state == LEFT_OUT, "it needs the first"
    assert results["third"].state == OK and results["third"].figures == {"a": 1}


def test_a_result_of_an_earlier_run_is_not_taken_for_this_one(tmp_path):
    Context("cuda", "", str(tmp_path)).leave(Result("first", OK, 1.0, "old", {}))
    _, results, _, _ = run(tmp_path, {"first": TIMED_OUT})
    assert results["first"].state == FAILED and "time limit" in results["first"].told


def test_a_limit_is_never_beyond_the_budget(tmp_path):
    _, results, workers, _ = run(tmp_path, {}, seconds=20.0)
    assert all(limit <= 20.0 for limit in workers.limits.values())
    _, results, workers, _ = run(tmp_path, {}, seconds=9.0)
    assert not workers.limits and results["third"].told.startswith("no time")


# ---- one check in its process ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "state", "words"),
    [
        (Findings("fine", {"a": 1}), OK, "fine"),
        (Findings("fine", {}), FAILED, "a is missing"),
        (Findings("measured", {"a": 1}, ["too large"]), FAILED, "too large; measured"),
        (ZeroDivisionError("by zero"), FAILED, "ZeroDivisionError: by zero"),
        (SystemExit(2), FAILED, "SystemExit"),
    ],
)
def test_what_a_check_returns_decides_its_state(monkeypatch, tmp_path, found, state, words):
    from gpu_checks import card

    def function(context):
        if isinstance(found, BaseException):
            raise found
        return found

    monkeypatch.setattr(card, "card", function)
    result = work(dataclasses.replace(CHECKS[0], figures=("a",)), Context("cpu", str(tmp_path), str(tmp_path)))
    assert (result.state, words in result.told) == (state, True), result


def marked(mark):
    """Processes with something like this in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def workers(tmp_path, code, warm=True):
    """Workers of a tool that does what ``code`` says, instead of importing torch."""
    tool = tmp_path / "tool.py"
    tool.write_text("import os, sys, time\n" + textwrap.dedent(code))
    (tmp_path / "log.txt").write_text("")
    return Workers(tool, Context("cpu", str(tmp_path), str(tmp_path)), tmp_path / "log.txt", warm=warm)


FORKS = """
if sys.argv[1] == "--worker":
    print("from nothing")
    sys.exit(3)
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if not child:
        os.setsid()
        {child}
        os._exit(5)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        pytest.param(FORKS.format(child="pass"), [5, 5], id="forked"),
        pytest.param(
            FORKS.format(child="print('Cannot re-initialize CUDA in forked subprocess', file=sys.stderr, flush=True)"),
            [3, 3],
            id="a fork cannot use the GPU",
        ),
        pytest.param(FORKS.format(child="time.sleep(60)"), [TIMED_OUT, 3], id="the first fork hangs"),
        pytest.param("sys.exit(3 if sys.argv[1] == '--worker' else 1)", [3, 3], id="nothing to fork"),
        pytest.param(
            FORKS.format(child="os.kill(os.getppid(), 9); time.sleep(60)"), [3, 3], id="what is forked has died"
        ),
    ],
)
def test_processes_are_forked_where_that_works_and_else_start_from_nothing(tmp_path, code, expected):
    pool = workers(tmp_path, code)
    pool.start(20.0)
    for code in expected:
        assert pool.run("one", 2.0) == code
        server = [] if pool._server is None else [pool._server.pid]
        assert marked(pool._mark) == server, "a check goes on beside the next one"
    pool.close()
    assert marked(pool._mark) == []


STARTS = """
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
{then}
"""


@pytest.mark.parametrize("then", ["pass", "time.sleep(60)"], ids=["ends", "hangs"])
@pytest.mark.parametrize("warm", [True, False], ids=["forked", "from nothing"])
def test_what_a_check_has_started_does_not_outlive_it(tmp_path, warm, then):
    """torchrun's workers, for instance, which lead sessions of their own."""
    starts = "import subprocess\n" + STARTS.format(then=then)
    pool = workers(
        tmp_path, FORKS.format(child=textwrap.indent(starts, " " * 8).strip()) if warm else starts, warm=warm
    )
    assert pool.start(20.0) == warm
    expected = TIMED_OUT if then != "pass" else 5 if warm else 0
    assert pool.run("one", 1.5) == expected
    assert marked(pool._mark) == ([pool._server.pid] if pool._server else [])
    pool.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_command_that_is_told_to_end_leaves_no_process_behind(tmp_path, number):
    arguments = ["--device", "cpu", "--fresh", "--only", "card", "--out", str(tmp_path)]
    process = subprocess.Popen([sys.executable, str(TOOL), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    mark = f"FIRE_GPU_CHECK={process.pid}-"
    for _ in range(200):
        if marked(mark):
            break
        time.sleep(0.05)
    assert marked(mark)
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130 and b"interrupted" in said
    assert marked(mark) == []


@pytest.mark.parametrize("warm", [True, False])
def test_an_interrupt_leaves_no_process_behind(tmp_path, warm):
    wait = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    pool = workers(tmp_path, FORKS.format(child=wait) if warm else wait, warm=warm)
    assert pool.start(20.0) == warm
    interrupt = partial(signal.pthread_kill, threading.main_thread().ident, signal.SIGINT)
    threading.Timer(1.0, interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        pool.run("one", 30.0)
    pool.close()
    pid = (tmp_path / "pid").read_text()
    for _ in range(50):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or " Z " in state.read_text():
            return
        time.sleep(0.1)
    raise AssertionError("the check goes on")


def test_a_process_beyond_its_limit_is_ended(tmp_path):
    pool = workers(tmp_path, "time.sleep(60)", warm=False)
    assert pool.run("one", 0.5) == TIMED_OUT
