"""What ``fire-megatron plan`` says of the runs that other checks have measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from fire_megatron.config.load import load_recipe
from gpu_checks import commands, decode, training
from gpu_checks.check import Context, Figure, Findings, rounded, said
from gpu_checks.models import ONE_LAYER, shape_folder

_MB = 2**20


def planned(context: Context) -> Findings:
    """Bytes and seconds, planned over measured: 1 is a plan that is right."""
    from fire_megatron.plan.hardware import GPUS

    card = str(context.earlier("card").get("card", "")).lower()
    gpu = next((gpu for name, gpu in GPUS.items() if name.partition("-")[0] in card), GPUS["h100"])
    plans = {
        **{f"decode_{rows}": _decode(context, rows, gpu) for rows in (32, 256)},
        "training_step": _training(context, gpu),
        "fused_loss_sampled": _loss(context, gpu),
        "whole_run": _whole_run(context, gpu),
    }
    figures: dict[str, Figure] = {"planned_for": gpu.name}
    told = []
    for check, said_of_it in plans.items():
        measured = _measured(context.earlier(check)) if context.gpu else {}  # another machine's
        for what, value in said_of_it.items():
            real = measured.get(what)
            ratio = value / real if real and value is not None else None
            figures |= {f"{check}_{what}": rounded(value), f"{check}_{what}_ratio": rounded(ratio)}
            told.append(f"{check} {said(rounded(value), what)}" + (f", {rounded(ratio)} of measured" if ratio else ""))
    start = f"for {gpu.name}" + ("" if context.gpu else ", which this is not")
    return Findings(f"{start}: {'; '.join(told)}", figures)


def _measured(figures: Mapping[str, Figure]) -> dict[str, Any]:
    return {"mb": figures.get("peak_mb"), "seconds": figures.get("seconds", figures.get("step_s"))}


def _plan(context: Context, gpu: Any, model: str, load: Mapping[str, int], micro_batch_tokens: int) -> Any:
    """Of one rank that holds a student, and a teacher of one layer."""
    from fire_megatron.plan.plan import make_job, make_plan

    precision = {"precision": {"dtype": "bfloat16"}}
    recipe = {
        "run": {"name": "planned", "dir": str(context.folder / "planned"), "steps": 1, "device": "auto"},
        "student": {"checkpoint": str(shape_folder(model, context)), **precision},
        "teachers": {
            "t": {"checkpoint": str(shape_folder(model.removesuffix(ONE_LAYER) + ONE_LAYER, context))} | precision
        },
        "data": {"train": [{"path": "prompts.jsonl"}], "max_prompt_tokens": load["prompt"]},
        "rollout": {"prompts_per_step": load["rows"], "max_new_tokens": load["response"]},
        "loss": {"hooks": []},
        "optimizer": {"micro_batch_tokens": micro_batch_tokens},
    }
    path = context.folder / "planned.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return make_plan(make_job(load_recipe(str(path), []), world_size=1, gpu=gpu, gpus_per_node=1))


def _decode(context: Context, rows: int, gpu: Any) -> dict[str, float]:
    """The model alone is there, as in the check; prompts of the mean length."""
    rows = decode.rows_of(context, rows)
    prompt = round(sum(decode.lengths(context, rows)) / rows)
    load = {"rows": rows, "prompt": prompt, "response": decode.new_tokens(context)}
    plan = _plan(context, gpu, decode.model_name(context), load, 8192)
    rank = plan.kinds[0].plan
    held = rank.roles["student"].weights + rank.phases["sampling"].trace.peak
    return {"mb": held / _MB, "seconds": plan.time.sampling}


def _training(context: Context, gpu: Any) -> dict[str, float]:
    size = training.sizes(context)
    load = {"rows": size.rows, "prompt": size.prompt, "response": size.response}
    plan = _plan(context, gpu, size.model, load, size.micro_batch_tokens)
    rank = plan.kinds[0].plan
    held = rank.roles["student"].bytes + rank.phases["update"].trace.peak
    return {"mb": held / _MB, "seconds": plan.time.update}


def _loss(context: Context, gpu: Any) -> dict[str, float]:
    """Of a micro-batch with as many response tokens as in the check."""
    rows, response = (8, 1024) if context.gpu else (4, 64)
    model = decode.model_name(context) + ONE_LAYER
    plan = _plan(context, gpu, model, {"rows": rows, "prompt": 1, "response": response}, rows * (response + 1))
    return {"mb": plan.kinds[0].plan.phases["update"].loss / _MB}


def _whole_run(context: Context, gpu: Any) -> dict[str, float]:
    """The recipe of the run itself, so small that launches decide."""
    from fire_megatron.plan.plan import make_job, make_plan

    path = context.folder / "planned_run.yaml"
    path.write_text(yaml.safe_dump(commands.recipe(context, "planned_run")))
    overrides = ["student.layer_spec=local", "teachers.math.layer_spec=local", "teachers.code.layer_spec=local"]
    plan = make_plan(make_job(load_recipe(str(path), overrides), world_size=1, gpu=gpu, gpus_per_node=1))
    return {"mb": plan.kinds[0].peak / _MB, "seconds": plan.time.total}
