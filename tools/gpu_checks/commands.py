"""Whole runs through the command line, on tiny models: what a user types, with nothing in between."""

from __future__ import annotations

import contextlib
import json
import math
import runpy
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fire_megatron.metrics.jsonl import read_metrics
from gpu_checks.check import PROJECT, Context, Findings, NotHere, need, rounded

ROLES = ("student", "math", "code")
STEPS = 2
"""Before the run is resumed."""


@contextlib.contextmanager
def _arguments(name: str, arguments: Sequence[str]):
    kept, sys.argv = sys.argv, [name, *arguments]
    try:
        yield
    finally:
        sys.argv = kept


def command(name: str, *arguments: str) -> None:
    """``python -m NAME ARGUMENTS``, or ``python NAME.py ARGUMENTS`` of a file of the project, in this process, which is
    one of its own.

    Raises:
        RuntimeError: it ended with another exit code than 0.
    """
    print("$", name, *arguments, flush=True)
    try:
        with _arguments(name, arguments):
            if name.endswith(".py"):
                runpy.run_path(str(PROJECT / name), run_name="__main__")
            else:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as left:
        if left.code not in (None, 0):
            print(left.code, file=sys.stderr)
            raise RuntimeError(f"{name} ended with {str(left.code)[-300:]}") from None


def models(context: Context) -> Findings:
    """Tiny models, made and converted."""
    need("transformers")
    started = time.monotonic()
    hf = context.folder / "tiny_hf"
    command("tools/make_tiny.py", "--out", str(hf))
    made = time.monotonic()
    for role in ROLES:
        convert(hf / role, context.folder / "tiny" / role)
    figures = {"make_s": rounded(made - started), "convert_s": rounded(time.monotonic() - made)}
    return Findings(f"made in {figures['make_s']} s, converted in {figures['convert_s']} s", figures)


def convert(hf: Path, out: Path) -> None:
    """A Hugging Face folder, as a user converts it."""
    command("tools/convert.py", "hf-to-megatron", "--hf", str(hf), "--out", str(out), "--overwrite")


def recipe(context: Context, name: str) -> dict[str, Any]:
    """Of a run of a student and two teachers, FiRe's hooks on. Args: name: of the run's folder."""
    tiny, data = context.folder / "tiny", PROJECT / "recipes" / "data"
    precision = {"precision": {"dtype": "bfloat16"}}  # layer_spec is auto: Transformer Engine where it works
    rows, tokens = (16, 32) if context.gpu else (4, 6)
    return {
        "run": {
            "name": name,
            "dir": str(run_folder(context, name)),
            "steps": STEPS,
            "device": context.device,
            "threads": 0 if context.gpu else 1,
        },
        "student": {"checkpoint": str(tiny / "student"), **precision},
        "teachers": {name: {"checkpoint": str(tiny / name), **precision} for name in ROLES[1:]},
        "data": {"train": [{"path": str(data / f"{name}.jsonl")} for name in ROLES[1:]], "max_prompt_tokens": 128},
        "rollout": {"prompts_per_step": rows, "max_new_tokens": tokens},
        "loss": {"hooks": [{"name": "filter", "percentile": 20}, {"name": "reweight"}]},
        "optimizer": {"lr": 1e-3, "micro_batch_size": 4},
        "checkpoint": {"every": 1, "async_save": True},
        "metrics": {"samples": 2, "console": False},
    }


def run_folder(context: Context, name: str) -> Path:
    """Of a run."""
    return context.folder / "runs" / name


def train(context: Context, name: str, overrides: Sequence[str] = (), *, again: bool = False) -> list[dict[str, Any]]:
    """Metrics of a run, a step each. Args: again: the run is there, and goes on."""
    folder = run_folder(context, name)
    if not again:
        shutil.rmtree(folder, ignore_errors=True)
    path = context.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe(context, name)))
    command("fire_megatron.train", "--recipe", str(path), *overrides)
    return read_metrics(folder)


def _step(line: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a step's metrics."""
    names = {
        "loss": "loss",
        "grad_norm": "grad_norm",
        "step_s": "time/step",
        "rollout_s": "time/rollout",
        "update_s": "time/update",
        "peak_mb": "memory/peak_mb",
        "importance": "rollout/importance_mean",
    }
    return {name: rounded(line.get(key), 4) for name, key in names.items()}


def _problems(lines: Sequence[Mapping[str, Any]], steps: int) -> list[str]:
    if [line["step"] for line in lines] != list(range(1, steps + 1)):
        return [f"steps {[line['step'] for line in lines]} instead of 1 to {steps}"]
    bad = [line["step"] for line in lines if not (math.isfinite(line["loss"]) and line["grad_norm"] > 0)]
    return [f"loss or gradient of step {bad} is not sound"] if bad else []


def _told(figures: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in figures.items() if value is not None)


def whole_run(context: Context) -> Findings:
    """Sampling, two teachers, filter and weights, update, saving in the background."""
    lines = train(context, "whole_run")
    saved = sorted(path.name for path in (run_folder(context, "whole_run") / "checkpoints").glob("step_*"))
    problems = _problems(lines, STEPS)
    if len(saved) != STEPS:
        problems.append(f"saved {saved}, not {STEPS} steps")
    figures = {"steps": len(lines), "first_loss": rounded(lines[0]["loss"], 4), **_step(lines[-1])}
    return Findings(_told(figures), figures, problems)


def resume(context: Context) -> Findings:
    """The same run for one step more."""
    file = run_folder(context, "whole_run") / "metrics.jsonl"
    before = file.read_text()
    lines = train(context, "whole_run", [f"run.steps={STEPS + 1}", "run.resume=must"], again=True)
    problems = _problems(lines, STEPS + 1)
    if not file.read_text().startswith(before):
        problems.append("the steps before were run anew")
    status = json.loads((file.parent / "status.json").read_text())
    if status["state"] != "done":
        problems.append(f"status.json says {status['state']}")
    figures = {"steps": len(lines), **_step(lines[-1])}
    return Findings(_told(figures), figures, problems)


def variant(
    context: Context, name: str, overrides: Sequence[str], on_cpu: Sequence[str], same: bool, fp8: str | None
) -> Findings:
    """The first run with other settings. Args: on_cpu: what a CPU needs besides; same: whether its numbers must be the
    same; fp8: recipe, which a GPU may not have."""
    if fp8 and context.gpu:
        need_fp8(context, fp8)
    lines = train(context, name, [*overrides, *([] if context.gpu else on_cpu)])
    problems = _problems(lines, STEPS)
    first = context.earlier("whole_run")["first_loss"]
    figures = {"steps": len(lines), "first_loss": rounded(lines[0]["loss"], 4), **_step(lines[-1])}
    figures["first_loss_of_whole_run"] = first
    if same and abs(figures["first_loss"] - first) > 1e-3:
        problems.append(f"the first loss is not that of whole_run, {first}")
    return Findings(_told(figures), figures, problems)


def transformer_engine(context: Context) -> Findings:
    """Whether it works here; without it all models have megatron-core's layers, and this line says so."""
    from fire_megatron.platform.capabilities import detect_capabilities
    from fire_megatron.platform.device import select_device

    found = detect_capabilities(select_device(context.device))[0]
    if found.version is None:
        raise NotHere(found.detail)
    return Findings(f"{found.version}: {found.detail}", {"version": found.version})


def need_fp8(context: Context, recipe: str) -> None:
    """Raise NotHere where FP8 by this recipe cannot be used."""
    from fire_megatron.models.fp8.settings import unsupported

    transformer_engine(context)
    reason = unsupported(recipe)
    if reason:
        raise NotHere(f"{recipe}: {reason}")


def export(context: Context) -> Findings:
    """The last step, to Hugging Face, and read by transformers."""
    need("transformers")
    import torch
    from transformers import AutoModelForCausalLM

    step = max((run_folder(context, "whole_run") / "checkpoints").glob("step_*"))
    out = context.folder / "exported"
    started = time.monotonic()
    command("tools/convert.py", "megatron-to-hf", "--checkpoint", str(step), "--out", str(out), "--overwrite")
    spent = time.monotonic() - started
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(context.folder / "tiny_hf" / "student", dtype=torch.float32)
    ids = torch.arange(10, 26)[None]
    with torch.no_grad():
        logits, before = model(ids).logits, start(ids).logits
    moved = float((logits - before).abs().mean())
    problems = [] if bool(torch.isfinite(logits).all()) else ["its logits are not finite"]
    if not 0 < moved < 1:
        problems.append("the logits are not those of the student after some steps")
    figures = {"export_s": rounded(spent), "step": int(step.name.rpartition("_")[2]), "logits_moved_by": rounded(moved)}
    return Findings(
        f"step {figures['step']} in {figures['export_s']} s; logits moved by {moved:.3g}", figures, problems
    )
