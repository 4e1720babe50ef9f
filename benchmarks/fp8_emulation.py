#!/usr/bin/env python3
"""What emulated FP8 changes, against bfloat16 without it in the same run: one pass on the same answers, and whole runs.

    make quickstart   # or: make demo, and tools/convert.py for student, math and code
    python benchmarks/fp8_emulation.py --models demo/megatron [--runs --run-student DIR]

The student's weights and activations are bfloat16, its linear layers in FP8 by each recipe.

- One pass (teacher-forced), of each of the models `--students`: it answers one batch of prompts once, the teachers
  score the answers, and every way computes loss and gradients of the same batch from the same weights. The float32 row
  says how far bfloat16 itself is off. `|d log p|` is the mean change of a response token's log-probability; `cosine`
  and `norm` compare the gradients of all weights together, `worst` is the smallest cosine of one of the layers' weight
  matrices; the last columns are relative errors of rounding (Frobenius), the mean over the layers of the model.
  `delayed` has seen the batch once; `2 ends` leaves two layers at each end of the model in bfloat16.
- Runs, with `--runs`: distillation from the same start on the same prompts, each way sampling its own answers. `curve`
  is the mean distance of a step's loss from bfloat16's, relative to the mean loss there; `gradient` the mean ratio of
  the gradient norms; then the held-out reverse KL. The second bfloat16 run, of another seed, says what sampling does.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import sides
from fire_megatron.metrics.jsonl import read_metrics

REPOSITORY = sides.REPOSITORY
RECIPE = REPOSITORY / "recipes" / "smollm2_two_teachers.yaml"
RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
FP8 = {f"{name} hybrid": {"recipe": name, "format": "hybrid"} for name in RECIPES}
FP8["tensorwise, 2 ends"] = {"recipe": "tensorwise", "format": "hybrid", "first_last_bf16": 2}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder of converted student, math and code")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=8, help="answers a step")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--students", nargs="*", default=["student", "math"], help="models of the one pass")
    parser.add_argument("--run-student", type=Path, help="where the runs start from, if not from student of --models")
    parser.add_argument("--run-set", nargs="*", default=[], metavar="KEY=VALUE", help="recipe keys of all runs")
    parser.add_argument("--runs", action="store_true", help="whole runs too")
    parser.add_argument("--ways", nargs="*", help="first words of the ways to run beside bfloat16; all if left out")
    sides.add_toy(parser)
    return parser


def _settings(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Overrides that all have in common."""
    return {
        "run.dir": folder / "run",
        "run.steps": args.steps,
        "optimizer.warmup_steps": min(3, args.steps),
        "run.device": "cpu",
        **{
            f"{role}.checkpoint": args.models / role.split(".")[-1]
            for role in ("student", "teachers.math", "teachers.code")
        },
        **{
            f"data.train.{i}.path": REPOSITORY / "recipes" / "data" / f"{name}.jsonl"
            for i, name in enumerate(("math", "code"))
        },
        **{
            f"evaluation.prompts.{i}.path": REPOSITORY / "recipes" / "data" / f"heldout_{name}.jsonl"
            for i, name in enumerate(("math", "code"))
        },
        "rollout.prompts_per_step": args.prompts,
        "rollout.max_new_tokens": args.new_tokens,
        "evaluation.max_new_tokens": args.new_tokens,
        "evaluation.num_prompts": 8,
        "checkpoint.final": "false",
        "metrics.console": "false",
    }


# ---- one pass -----------------------------------------------------------------------------------------------------


class _Watching:
    """Passes on what a layer's rounding does and keeps its relative errors."""

    def __init__(self, rounding: Any, errors: dict[str, list[float]]) -> None:
        self._rounding, self._errors = rounding, errors

    def observe(self, operand: str, x: Any) -> None:
        """As before."""
        self._rounding.observe(operand, x)

    def __call__(self, operand: str, x: Any, *, by_rows: bool) -> Any:
        """As before."""
        return self._rounding(operand, x, by_rows=by_rows)

    def both(self, operand: str, x: Any) -> Any:
        """As before, with the errors noted."""
        both = self._rounding.both(operand, x)
        for rounded in both:
            norm = x.float().norm()
            if norm > 0:
                self._errors[operand].append(float((rounded.values() - x.float()).norm() / norm))
        return both


def _pass(run: Any, recipe: Any, rows: Any, tokens: float, dtype: str, fp8: dict[str, Any] | None) -> dict[str, Any]:
    """Loss, log-probabilities, gradients and rounding errors of one update's forward and backward."""
    import torch

    from fire_megatron.checkpoint.loading import load_weights
    from fire_megatron.config.hf_config import read_hf_config
    from fire_megatron.config.schema import FP8Config, PrecisionConfig
    from fire_megatron.models.build import build_model
    from fire_megatron.platform.device import Device
    from fire_megatron.train.student import Student

    precision = PrecisionConfig(dtype=dtype, fp8=None if fp8 is None else FP8Config(**fp8, emulate=True))
    role = recipe.student.replace(precision=precision)
    model = build_model(read_hf_config(role.checkpoint), role, run.grid, device=Device("cpu"))
    load_weights(model, Path(role.checkpoint), grid=run.grid)
    model.used_vocab_size = run.student.model.used_vocab_size
    student = Student(model, run.grid, loss=recipe.loss, optimizer=recipe.optimizer, precision=precision)
    errors: dict[str, list[float]] = {"input": [], "weight": [], "gradient": []}
    emulated = model.emulated_fp8
    if emulated is not None:
        if emulated.scales is not None:
            student.accumulate_gradients(rows, tokens=tokens)
        for product in emulated.products.values():
            product.rounding = _Watching(product.rounding, errors)
    loss = student.accumulate_gradients(rows, tokens=tokens)["loss"]
    gradients = {name: p.main_grad.detach().clone() for name, p in model.named_parameters()}
    return {
        "loss": loss.result,
        "log_probs": torch.cat(student.log_probs(rows)),
        "gradients": gradients,
        "errors": {name: statistics.mean(values) if values else 0.0 for name, values in errors.items()},
    }


def _compare(ours: dict[str, Any], baseline: dict[str, Any]) -> str:
    """A row of the table."""
    import torch

    flat = [torch.cat([g.flatten().double() for g in run["gradients"].values()]) for run in (ours, baseline)]
    cosine = torch.cosine_similarity(*flat, dim=0)
    worst = min(
        float(torch.cosine_similarity(g.flatten(), baseline["gradients"][name].flatten(), dim=0))
        for name, g in ours["gradients"].items()
        if ".linear_" in name and g.dim() == 2
    )
    shift = (ours["log_probs"] - baseline["log_probs"]).abs().mean()
    relative = ours["loss"] / baseline["loss"] - 1
    errors = "".join(f"{ours['errors'][name]:9.4f}" for name in ("input", "weight", "gradient"))
    norm = flat[0].norm() / flat[1].norm()
    return f"{ours['loss']:9.4f}{relative:+9.4f}{shift:10.4f}{cosine:9.4f}{norm:8.3f}{worst:8.4f}{errors}"


def one_pass(args: argparse.Namespace, student: str, world: Any) -> None:
    """Every way on the same answers of a model; prints the table."""
    from fire_megatron.config.load import load_recipe
    from fire_megatron.train.lifecycle import Trainer
    from fire_megatron.train.loop import open_scoring, sample, score
    from fire_megatron.train.rebalance import rebalance
    from fire_megatron.train.select import select

    with tempfile.TemporaryDirectory() as name:
        settings = {**_settings(args, Path(name)), "student.checkpoint": args.models / student}
        overrides = [f"{key}={value}" for key, value in settings.items()]
        recipe = load_recipe(RECIPE, overrides)
        trainer = Trainer(recipe, world)
        run = trainer.run
        asked = run.own_rows(0)
        scoring = open_scoring(run, asked)
        rollouts = sample(run, asked, scoring, 0)
        scores = score(run, scoring, rollouts)
        selected = select(rollouts, scores, run.hooks, run.router.names, micro_batch_size=4, grid=run.grid)
        rows = rebalance(selected.rows, run.prompts(0), run.router.target, grid=run.grid, memory=run.memory)
        rows, _ = run.router.attach(rows, scores.kept)
        tokens = float(sum(len(r) for r in rows.rollouts.responses))
        ways = {"bfloat16": ("bfloat16", None), "float32": ("float32", None)}
        ways |= {way: ("bfloat16", fp8) for way, fp8 in FP8.items()}
        lines, baseline = [], None
        for way, (dtype, fp8) in tqdm(ways.items(), unit="pass"):
            found = _pass(run, recipe, rows, tokens, dtype, fp8)
            baseline = baseline or found
            lines.append(f"{way:20}{_compare(found, baseline)}")
            gc.collect()  # a student and its buffers refer to each other
    print(f"One pass of {student}: {len(rows)} answers, {tokens:.0f} tokens")
    print(
        f"{'':20}{'loss':>9}{'loss':>9}{'|d log p|':>10}{'cosine':>9}{'norm':>8}{'worst':>8}"
        f"{'input':>9}{'weight':>9}{'gradient':>9}"
    )
    print("\n".join(lines), flush=True)


# ---- runs ---------------------------------------------------------------------------------------------------------


def _run(args: argparse.Namespace, changes: dict[str, Any]) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as name:
        settings = {**_settings(args, Path(name)), "student.precision.dtype": "bfloat16", "run.threads": 1, **changes}
        sides.train(1 if args.toy else 2, settings, recipe=RECIPE, toy=args.toy)
        return read_metrics(Path(name) / "run")


def _held_out(lines: list[dict[str, float]]) -> list[float]:
    """Mean over the teachers of the reverse KL, before and after."""
    keys = [f"eval/{name}/reverse_kl" for name in ("math", "code")]
    return [statistics.mean(line[key] for key in keys) for line in lines if keys[0] in line]


def runs(args: argparse.Namespace) -> None:
    """A run each way; prints the table."""
    ways: dict[str, dict[str, Any]] = {"bfloat16": {}, "bfloat16, another seed": {"run.seed": 4321}}
    ways |= {way: {"student.precision.fp8": json.dumps({**fp8, "emulate": True})} for way, fp8 in FP8.items()}
    if args.ways is not None:
        ways = {way: changes for way, changes in ways.items() if way == "bfloat16" or way.startswith(tuple(args.ways))}
    if args.run_student:
        ways = {way: {**changes, "student.checkpoint": args.run_student.resolve()} for way, changes in ways.items()}
    common = dict(text.split("=", 1) for text in args.run_set)
    ways = {way: {**changes, **common} for way, changes in ways.items()}
    found = {}
    print(
        f"Runs: {args.steps} steps of {args.prompts} answers of up to {args.new_tokens} tokens, 2 processes", flush=True
    )
    print(f"{'':32}{'curve':>8}{'gradient':>9}{'KL before':>11}{'after':>8}{'ratio':>7}{'seconds':>9}", flush=True)
    for way in tqdm(ways, unit="run"):
        lines = found[way] = _run(args, ways[way])
        base = found["bfloat16"]
        steps = [(a, b) for a, b in zip(lines, base, strict=True) if "loss" in a]
        scale = statistics.mean(abs(b["loss"]) for _, b in steps)
        curve = statistics.mean(abs(a["loss"] - b["loss"]) for a, b in steps) / scale
        gradient = statistics.mean(a["grad_norm"] / b["grad_norm"] for a, b in steps)
        kl = [_held_out(run) for run in (lines, base)]
        seconds = statistics.median(a["time/update"] for a, _ in steps)
        tqdm.write(
            f"{way:32}{curve:8.4f}{gradient:9.3f}{kl[0][0]:11.4f}{kl[0][-1]:8.4f}{kl[0][-1] / kl[1][-1]:7.3f}"
            f"{seconds:9.2f}", file=sys.stdout,
        )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Both parts."""
    args = _parser().parse_args(argv)
    args.models = args.models.resolve()
    from fire_megatron.platform import launch

    world = launch.start("cpu", threads=1)
    for student in args.students:
        one_pass(args, student, world)
    launch.stop()
    if args.runs:
        runs(args)


if __name__ == "__main__":
    main()
