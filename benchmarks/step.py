#!/usr/bin/env python3
"""Our distillation step against TRL's on the same two models, prompts and token counts, in one run on one machine.

    python benchmarks/step.py --student HF_DIR --teacher HF_DIR --prompts PROMPTS.jsonl \
        [--peer-python /tmp/trl-env/bin/python --rollouts 8 --new-tokens 64 --steps 4 --threads 2]

Both sides run as processes of their own, float32 or bfloat16, one process, the same number of threads, in turn: sample
`--rollouts` answers of up to `--new-tokens` tokens, score them with the teacher, forward, backward, AdamW. Seconds are
those of a whole step, the median over the steps after the first, of the best round; memory is the process's peak
resident set, of the worst, with `--device cuda` that of tensors on the GPU. `trl 1.16` passes all rollouts at once, as
its users' scripts do; `trl, micro` accumulates gradients over micro-batches of the size that ours has. TRL computes the
reverse KL over the full vocabulary, we the policy gradient of the same reverse KL on the sampled tokens. With
`--dtype bfloat16` AdamW is over float32 weights on our side, over bfloat16 ones on TRL's. The row `ours, FiRe` has the
filter and reweight hooks on and so trains on fewer rows; it is not the one compared.
The peer is run by trl_distill.py beside this file, in an environment with `pip install torch==2.13.0 trl==1.16.0`;
without one our own rows stand alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import sides
from benchmarks.products import phase_seconds
from fire_megatron.metrics.jsonl import read_metrics

HERE = Path(__file__).resolve().parent
FIRE_HOOKS = "[{name: filter, percentile: 20}, {name: reweight}]"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True, type=Path, help="Hugging Face folder")
    parser.add_argument("--teacher", required=True, type=Path, help="Hugging Face folder")
    parser.add_argument("--prompts", required=True, type=Path, help="JSONL with a 'problem' field")
    parser.add_argument("--peer-python", type=Path, help="python of an environment with TRL 1.16")
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-prompt-chars", type=int, default=350)
    parser.add_argument("--micro-batch-size", type=int, default=2, help="answers in one of our update's passes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights, on both sides")
    parser.add_argument("--rounds", type=int, default=1, help="repeat both sides in turn; the best round counts")
    sides.add_toy(parser)
    return parser


def _peer(args: argparse.Namespace, micro: int) -> dict[str, float]:
    own = ("peer_python", "micro_batch_size", "rounds", "toy")
    shared = {key: value for key, value in vars(args).items() if key not in own}
    flags = [text for key, value in shared.items() for text in (f"--{key.replace('_', '-')}", value)]
    command = [HERE / "trl_distill.py", *flags, "--micro-batch-size", micro]
    printed = sides.run(*command, python=args.peer_python, threads=args.threads)
    report = json.loads(printed.splitlines()[-1])
    return _summary(report["step_seconds"], report["peak_mb"], report["tokens_per_step"])


def _ours(args: argparse.Namespace, work: Path, hooks: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=work) as run:
        overrides = {
            "run.dir": run,
            "run.steps": args.steps,
            "run.threads": args.threads,
            "run.device": args.device,
            "student.precision.dtype": args.dtype,
            "teachers.peer.precision.dtype": args.dtype,
            "student.checkpoint": work / "student",
            "teachers.peer.checkpoint": work / "teacher",
            "data.train.0.path": work / "prompts.jsonl",
            "rollout.prompts_per_step": args.rollouts,
            "rollout.max_new_tokens": args.new_tokens,
            "optimizer.micro_batch_size": args.micro_batch_size,
            "loss.hooks": hooks,
        }
        sides.train(1, overrides, recipe=HERE / "step.yaml", toy=args.toy, threads=args.threads)
        lines = read_metrics(Path(run))
    return _summary(
        [line["time/step"] for line in lines],
        max(line["memory/peak_mb"] for line in lines),
        [line["rollout/tokens"] for line in lines],
    ) | {
        f"{phase}_s": statistics.median(x[f"time/{key}"] for x in lines[1:])
        for phase, key in (("rollout", "rollout"), ("teacher", "teacher_exposed"), ("update", "update"))
    }


def _summary(seconds: list[float], memory: float, tokens: list[float]) -> dict[str, float]:
    later = slice(1, None) if len(seconds) > 1 else slice(None)
    return {
        "step_s": statistics.median(seconds[later]),
        "peak_mb": memory,
        "tokens": statistics.mean(tokens[later]),
    }


def _prepare(args: argparse.Namespace, work: Path) -> int:
    """Convert both models and write the prompts that the peer will take; returns tokens of a prompt, on average."""
    for role in ("student", "teacher"):
        convert = [sides.REPOSITORY / "tools" / "convert.py", "hf-to-megatron"]
        sides.run(*convert, "--hf", getattr(args, role), "--out", work / role, toy=args.toy, threads=args.threads)
    problems = [json.loads(line)["problem"] for line in args.prompts.read_text(encoding="utf-8").splitlines()]
    chosen = [p for p in problems if len(p) < args.max_prompt_chars][: args.rollouts * args.steps]
    if len(chosen) < args.rollouts * args.steps:
        sys.exit(f"{args.prompts}: {len(chosen)} prompts are short enough; {args.rollouts * args.steps} are needed")
    (work / "prompts.jsonl").write_text("".join(json.dumps({"problem": p}) + "\n" for p in chosen), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(args.student)
    chats = [[{"role": "user", "content": problem}] for problem in chosen]
    render = tokenizer.apply_chat_template if tokenizer.chat_template else None
    ids = [
        render(c, add_generation_prompt=True, return_dict=False) if render else tokenizer(c[0]["content"]).input_ids
        for c in chats
    ]
    return round(statistics.mean(map(len, ids)))


def _print_products(args: argparse.Namespace, ours: dict[str, float], prompt_tokens: int) -> dict[str, float]:
    """Each phase's seconds over those of its products."""
    torch.set_num_threads(args.threads)
    floor = phase_seconds(
        args.student,
        args.teacher,
        rollouts=args.rollouts,
        prompt_tokens=prompt_tokens,
        new_tokens=round(ours["tokens"] / args.rollouts),
        micro_batch_size=args.micro_batch_size,
    )
    print(f"{'':12}{'seconds':>9}{'products':>10}{'ratio':>8}")
    for phase, seconds in floor.items():
        print(f"{phase:12}{ours[f'{phase}_s']:9.2f}{seconds:10.2f}{ours[f'{phase}_s'] / seconds:8.2f}")
    return floor


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table and a JSON line."""
    args = _parser().parse_args(argv)
    measures: dict[str, Any] = {
        "ours": lambda work: _ours(args, work, "[]"),
        "ours, FiRe": lambda work: _ours(args, work, FIRE_HOOKS),
    }
    if sides.has_trl(args.peer_python):
        peers = {"trl 1.16": args.rollouts, "trl, micro": args.micro_batch_size}
        measures = {name: lambda work, size=size: _peer(args, size) for name, size in peers.items()} | measures
    best: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prompt_tokens = _prepare(args, work)
        for number in range(args.rounds):
            for name, measure in measures.items():
                print(f"round {number + 1} of {args.rounds}: {name} ...", file=sys.stderr, flush=True)
                result = measure(work)
                if name in best:
                    result["peak_mb"] = max(result["peak_mb"], best[name]["peak_mb"])
                    if best[name]["step_s"] < result["step_s"]:
                        result = best[name] | {"peak_mb": result["peak_mb"]}
                best[name] = result
    peer = best.get("trl 1.16", best["ours"])
    print(f"ratios are to {'TRL' if 'trl 1.16' in best else 'our step without hooks'}")
    print(f"{'':12}{'s/step':>9}{'ratio':>8}{'peak MB':>10}{'ratio':>8}{'tokens':>9}   rollout + teacher + update s")
    for name, side in best.items():
        phases = " + ".join(f"{side[k]:.2f}" for k in ("rollout_s", "teacher_s", "update_s") if k in side)
        print(
            f"{name:12}{side['step_s']:9.2f}{side['step_s'] / peer['step_s']:8.2f}{side['peak_mb']:10.0f}"
            f"{side['peak_mb'] / peer['peak_mb']:8.2f}{side['tokens']:9.0f}   {phases}"
        )
    if args.device == "cpu":
        best["products"] = _print_products(args, best["ours"], prompt_tokens)
    print(json.dumps(best))


if __name__ == "__main__":
    main()
