#!/usr/bin/env python3
"""Sampling: our engine against an earlier checkout of it, vLLM and transformers, in one run on one machine.

    python benchmarks/rollout.py --hf demo/hf/math --prompts recipes/data/math.jsonl [--rows 16 64] [--new-tokens 128]
        [--batch-size 16] [--baseline CHECKOUT] [--vllm-python /tmp/vllm-env/bin/python]

Every side is a process of its own, float32, temperature 1, the same prompts and limits, with the same number of threads
(vLLM bound to as many cores); sides take turns, and the best round of each counts. `equal` answers all have
`--new-tokens` tokens; `varied` ones end at the tokens named by `--stop`, as their samples fall, and so differ from one
token to the limit. Where there are more rows than `--batch-size`, rows wait for a slot (transformers: for a batch).
Tokens are those of answers; prompts are run within the time too. Memory is the process's peak resident set, to which
vLLM's cache belongs (VLLM_CPU_KVCACHE_SPACE, 1 GiB here).
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import sides


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", required=True, type=Path, help="Hugging Face folder of the model")
    parser.add_argument("--prompts", required=True, type=Path, help="JSONL with a 'problem' field")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64], help="prompts, one measurement each")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=0, help="rows decoded together; 0 for all")
    parser.add_argument("--kinds", nargs="+", choices=["equal", "varied"], default=["equal", "varied"])
    parser.add_argument("--stop", nargs="+", default=["Ċ", "ĊĊ"], help="tokens that end `varied` answers")
    parser.add_argument("--baseline", type=Path, help="another checkout of this project")
    parser.add_argument("--vllm-python", type=Path, help="python of an environment with vLLM")
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--repeats", type=int, default=2, help="timed rounds in a process, after one to warm up")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each side, in turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    sides.add_toy(parser)
    return parser


def _sides(args: argparse.Namespace) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> engine, and the Python and environment that it is run in."""
    found: dict[str, tuple[str, dict[str, Any]]] = {"ours": ("megatron", {})}
    if args.baseline:
        found["baseline"] = ("megatron", {"PYTHONPATH": str(args.baseline.resolve())})
    if args.vllm_python:
        variables = {
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{args.threads - 1}",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
        }
        found["vllm"] = ("vllm", {"python": args.vllm_python, "PYTHONPATH": "", **variables})
    if not args.no_transformers:
        found["transformers"] = ("transformers", {})
    return found


def _prompts(args: argparse.Namespace) -> tuple[list[list[int]], list[int]]:
    """Token ids of the most prompts that are wanted, and those that end varied answers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.hf)
    problems = [json.loads(line)["problem"] for line in args.prompts.read_text(encoding="utf-8").splitlines()]
    chosen = [problem for problem in problems if len(problem) < 350][: max(args.rows)]
    if len(chosen) < max(args.rows):
        sys.exit(f"{args.prompts}: {len(chosen)} prompts are short enough; {max(args.rows)} are needed")
    ids = []
    for problem in chosen:
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": problem}]
            ids.append(list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)))
        else:
            ids.append(tokenizer(problem).input_ids)
    stop = [tokenizer.eos_token_id, *(tokenizer.convert_tokens_to_ids(token) for token in args.stop)]
    return ids, sorted({token for token in stop if token is not None})


def _measure(args: argparse.Namespace, job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    best: dict[str, dict[str, Any]] = {}
    for number in range(args.rounds):
        for name, (engine, options) in _sides(args).items():
            place = f"{len(job['prompts'])} rows, round {number + 1} of {args.rounds}"
            print(f"{place}: {name} ...", file=sys.stderr, flush=True)
            command = (Path(__file__).with_name("rollout_side.py"), engine, json.dumps(job))
            printed = sides.run(*command, toy=args.toy, threads=args.threads, **options)
            told = json.loads(printed.splitlines()[-1])
            speed = max(tokens / seconds for tokens, seconds in zip(told["tokens"], told["seconds"], strict=True))
            before = best.get(name, {"tokens_per_second": 0.0, "peak_mb": 0.0})
            best[name] = {
                "tokens_per_second": max(speed, before["tokens_per_second"]),
                "peak_mb": max(told["peak_mb"], before["peak_mb"]),
                "tokens": told["tokens"][-1],
                "lengths": [told["lengths"][0], statistics.median(told["lengths"]), told["lengths"][-1]],
            }
    return best


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table and a JSON line."""
    args = _parser().parse_args(argv)
    ids, stop = _prompts(args)
    results = []
    print(f"{'':22}{'tokens/s':>10}{'ours is':>9}{'peak MB':>10}{'tokens':>8}   shortest, median, longest answer")
    with tempfile.TemporaryDirectory() as work:
        convert = sides.REPOSITORY / "tools" / "convert.py"
        sides.run(convert, "hf-to-megatron", "--hf", args.hf, "--out", f"{work}/model", toy=args.toy)
        for rows in args.rows:
            for kind in args.kinds:
                job = {"hf": str(args.hf.resolve()), "megatron": f"{work}/model", "prompts": ids[:rows]}
                job |= {key: getattr(args, key) for key in ("new_tokens", "batch_size", "repeats", "threads", "seed")}
                job["stop_ids"] = stop if kind == "varied" else []
                best = _measure(args, job)
                for name, side in best.items():
                    times = best["ours"]["tokens_per_second"] / side["tokens_per_second"]
                    lengths = ", ".join(f"{n:g}" for n in side["lengths"])
                    print(
                        f"{rows:3} {kind:6} {name:12}{side['tokens_per_second']:9.1f}{times:8.2f}x"
                        f"{side['peak_mb']:10.0f}{side['tokens']:8}   {lengths}",
                        flush=True,
                    )
                results.append({"rows": rows, "kind": kind, "sides": best})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
