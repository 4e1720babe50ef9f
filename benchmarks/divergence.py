#!/usr/bin/env python3
"""The exact reverse KL with the output layer, ours against full logits and against TRL's chunked divergence.

    python benchmarks/divergence.py [--peer-python /tmp/trl-env/bin/python --tokens 4096 --rounds 2 --threads 2]

From final hidden states of student and teacher and their output weights to the mean reverse KL over the tokens and
the gradients of the student's hidden states and weight. Each side is a process of its own, in turn, on the same
random numbers:

    full logits   (a) the expression as it is written in PyTorch, on full float32 log-probabilities
    trl 1.16      (b) trl.kernels.chunked_divergence.ChunkedDivergenceFunction, run by --peer-python
    ours          fire_megatron.losses: chunked_linear_loss of full_loss, as in training
    products      what no implementation can avoid: the two logits, and the two gradients, as full matrix products

Seconds are those of forward and backward, the best of the rounds. Memory is the peak of the resident set above what
the inputs take, libraries loaded; it includes the gradients. It is measured in a process of its own, with the
allocator's defaults: for the seconds, freed memory stays with the process, as platform/ arranges for a run. The sizes
are those of real pairs: SmolLM2-360M with SmolLM2-1.7B (vocabulary 49152, hidden 960 and 2048), Qwen3-0.6B with
Qwen3-4B (151936, 1024 and 2560). Values that differ by more than 1e-3 end the benchmark with an error.
`--peer-python` needs `pip install torch==2.13.0 trl==1.16.0`; without it side (b) is left out.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import sides

CASES = [(49152, 960, 2048), (151936, 1024, 2560)]
"""Vocabulary, the student's and the teacher's hidden size."""
TOY = (512, 16, 24)
SIDES = ("full logits", "trl 1.16", "ours", "products")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, help="python of an environment with TRL 1.16")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[case[0] for case in CASES])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    sides.add_toy(parser)
    return parser


def _status_mb(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def _full_logits(student, teacher, weight, teacher_weight) -> Callable[[], object]:
    def loss():
        log_s = (student @ weight.t()).float().log_softmax(-1)
        log_t = (teacher @ teacher_weight.t()).float().log_softmax(-1)
        return (log_s.exp() * (log_s - log_t)).sum(-1).mean()

    return loss


def _trl(student, teacher, weight, teacher_weight) -> Callable[[], object]:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss():
        value, _ = ChunkedDivergenceFunction.apply(student, weight, None, teacher, teacher_weight, None, 1.0)
        return value.mean()

    return loss


def _ours(student, teacher, weight, teacher_weight) -> Callable[[], object]:
    import torch

    from fire_megatron.losses.divergences import build_divergence
    from fire_megatron.losses.fused import OutputLayer, chunked_linear_loss
    from fire_megatron.losses.token_losses import DivergenceSettings, Segment, VocabShard, full_loss

    settings, tokens = DivergenceSettings(build_divergence("reverse_kl")), len(student)

    def loss():
        segment = Segment([OutputLayer(teacher_weight)], [teacher], torch.ones(tokens, 1))
        shard = VocabShard(None, 0, len(weight))
        token_loss = full_loss([segment], torch.ones(tokens), settings, shard=shard, tokens=tokens)
        return chunked_linear_loss(student, weight, token_loss)[0]

    return loss


def _products(student, teacher, weight, teacher_weight) -> Callable[[], object]:
    import torch

    gradient = torch.zeros(len(student), len(weight), dtype=weight.dtype)

    def products():
        with torch.no_grad():
            _ = student @ weight.t()
            _ = teacher @ teacher_weight.t()
            return gradient @ weight, gradient.t() @ student

    return products


def _worker(task: dict) -> None:
    """Measure one side in this process; prints seconds and MB."""
    import torch

    torch.set_num_threads(task["threads"])
    dtype = getattr(torch, task["dtype"])
    tokens, (vocabulary, hidden, teacher_hidden) = task["tokens"], task["case"]
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int, columns: int, scale: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(scale).to(dtype)

    # Logits of a few units' spread, as a model's.
    student = draw(tokens, hidden, 1.0).requires_grad_()
    weight = draw(vocabulary, hidden, 3 / hidden**0.5).requires_grad_()
    teacher, teacher_weight = (
        draw(tokens, teacher_hidden, 1.0),
        draw(vocabulary, teacher_hidden, 3 / teacher_hidden**0.5),
    )
    build = {"full logits": _full_logits, "trl 1.16": _trl, "ours": _ours, "products": _products}[task["side"]]
    for _ in range(2):  # a small problem first: libraries load their code and take their own memory
        small = build(student[:64], teacher[:64], weight[:512], teacher_weight[:512])()
        if task["side"] != "products":
            small.backward()
            student.grad = weight.grad = small = None
    function = build(student, teacher, weight, teacher_weight)
    ctypes.CDLL(None).malloc_trim(0)  # what drawing the inputs took is given back
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident set starts anew
    before, seconds, value = _status_mb("VmRSS"), [], None
    for _ in range(task["passes"]):  # the first touches its memory for the first time
        started = time.perf_counter()
        result = function()
        if task["side"] != "products":
            result.backward()
            value = float(result.detach())
            student.grad = weight.grad = None
        seconds.append(time.perf_counter() - started)
    print(json.dumps({"seconds": min(seconds), "mb": _status_mb("VmHWM") - before, "value": value}))


def _measure(
    args: argparse.Namespace, side: str, case: tuple[int, int, int], dtype: str, *, memory: bool
) -> dict[str, float]:
    task = {"side": side, "case": case, "dtype": dtype, "tokens": args.tokens, "threads": args.threads}
    task["passes"] = 1 if memory else 2
    python = args.peer_python if side.startswith("trl") else sys.executable
    keep = {} if memory else {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_THRESHOLD_": str(2**40)}
    command = (__file__, "--worker", json.dumps(task))
    printed = sides.run(*command, toy=args.toy, python=python, threads=args.threads, **keep)
    return json.loads(printed.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table and a JSON line for each case."""
    args = _parser().parse_args(argv)
    if args.worker:
        _worker(json.loads(args.worker))
        return
    peer = sides.has_trl(args.peer_python)
    chosen = [side for side in SIDES if peer or not side.startswith("trl")]
    for case in [TOY] if args.toy else [case for case in CASES if case[0] in args.vocabularies]:
        for dtype in args.dtypes:
            best: dict[str, dict[str, float]] = {}
            for number in range(args.rounds + 1):
                for side in chosen:
                    what = f"round {number} of {args.rounds}" if number else "memory"
                    print(f"{case[0]} {dtype}: {what}: {side}", file=sys.stderr, flush=True)
                    result = _measure(args, side, case, dtype, memory=number == 0)
                    if number == 0:
                        best[side] = result | {"seconds": float("inf")}
                    else:
                        best[side]["seconds"] = min(best[side]["seconds"], result["seconds"])
            values = [side["value"] for side in best.values() if side["value"] is not None]
            if max(values) - min(values) > 1e-3 * max(values):
                sys.exit(f"{case}, {dtype}: the sides do not compute the same: {best}")
            plain, other, bare = best["full logits"], best.get("trl 1.16"), best["products"]
            print(f"\nvocabulary {case[0]}, hidden {case[1]} and {case[2]}, {args.tokens} tokens, {dtype}")
            print(f"{'':12}{'s':>8}{'/ (b)':>8}{'/ products':>12}{'MB':>9}{'/ (a)':>8}{'/ (b)':>8}   reverse KL")
            for side, r in best.items():
                value = "" if r["value"] is None else f"{r['value']:.5f}"
                seconds, mb = ((f"{r[key] / other[key]:8.3f}" if other else f"{'-':>8}") for key in ("seconds", "mb"))
                ratio = r["mb"] / max(plain["mb"], 1e-9)
                print(
                    f"{side:12}{r['seconds']:8.2f}{seconds}{r['seconds'] / bare['seconds']:12.2f}"
                    f"{r['mb']:9.0f}{ratio:8.3f}{mb}   {value}"
                )
            print(json.dumps({"case": case, "dtype": dtype, "tokens": args.tokens} | best), flush=True)


if __name__ == "__main__":
    main()
