"""One side of benchmarks/rollout.py: samples answers and prints what that took. Run by it, in a process and an
environment of its own; imports nothing but what its engine needs.

    python benchmarks/rollout_side.py megatron|transformers|vllm JSON
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

Answers = Callable[[], list[int]]
"""Samples all prompts once; returns the number of tokens of each answer."""


def megatron(job: dict[str, Any]) -> Answers:
    """Our engine, of whatever checkout comes first on PYTHONPATH."""
    from pathlib import Path

    from fire_megatron.checkpoint.loading import load_weights
    from fire_megatron.config.hf_config import read_hf_config
    from fire_megatron.config.schema import PrecisionConfig, StudentConfig
    from fire_megatron.data.records import Prompt
    from fire_megatron.models.build import build_model
    from fire_megatron.parallel.grid import GridFactory, Layout
    from fire_megatron.platform import launch
    from fire_megatron.rollout.engine import MegatronEngine
    from fire_megatron.rollout.sampling import Sampling

    world = launch.start("cpu", threads=job["threads"])
    role = StudentConfig(checkpoint=job["megatron"], precision=PrecisionConfig(dtype="float32"))
    grid = GridFactory(timeout=600).grid(Layout())
    model = build_model(read_hf_config(Path(job["hf"])), role, grid, device=world.device)
    load_weights(model, Path(job["megatron"]), grid=grid)
    prompts = [Prompt(i, "math", tuple(ids), "") for i, ids in enumerate(job["prompts"])]
    engine, names = MegatronEngine(model, grid), ("batch_size", "seed")
    sampling = Sampling(
        max_new_tokens=job["new_tokens"], stop_ids=frozenset(job["stop_ids"]), **{name: job[name] for name in names}
    )
    return lambda: [len(r) for r in engine.generate(prompts, range(len(prompts)), sampling=sampling, step=0).responses]


def transformers(job: dict[str, Any]) -> Answers:
    """``generate``, all prompts in batches of the same size, padded on the left."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    model = AutoModelForCausalLM.from_pretrained(job["hf"], dtype=torch.float32).eval()
    stop = job["stop_ids"] or [model.config.vocab_size]
    size = job["batch_size"] or len(job["prompts"])

    def sample() -> list[int]:
        lengths = []
        for start in range(0, len(job["prompts"]), size):
            rows = job["prompts"][start : start + size]
            longest = max(map(len, rows))
            ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
            settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
            settings |= {"max_new_tokens": job["new_tokens"], "eos_token_id": stop, "pad_token_id": 0}
            made = model.generate(ids, attention_mask=mask, **settings)[:, longest:]
            for row in made.tolist():
                ends = [place + 1 for place, token in enumerate(row) if token in stop]
                lengths.append(min(ends, default=len(row)))
        return lengths

    return sample


def vllm(job: dict[str, Any]) -> Answers:
    """vLLM in process, with log-probabilities as a trainer needs them, without its prefix cache (every round would find
    the prompts of the one before)."""
    from vllm import LLM, SamplingParams

    longest = max(map(len, job["prompts"])) + job["new_tokens"]
    engine = LLM(
        job["hf"],
        dtype="float32",
        max_model_len=longest,
        enable_prefix_caching=False,
        max_num_seqs=job["batch_size"] or len(job["prompts"]),
        seed=job["seed"],
    )
    settings = SamplingParams(
        temperature=1.0,
        max_tokens=job["new_tokens"],
        stop_token_ids=job["stop_ids"],
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    return lambda: [len(o.outputs[0].token_ids) for o in engine.generate(prompts, settings, use_tqdm=False)]


def main() -> None:
    """Print a JSON line of seconds and numbers of tokens of every round, and the peak of resident memory."""
    job = json.loads(sys.argv[2])
    sample = {"megatron": megatron, "transformers": transformers, "vllm": vllm}[sys.argv[1]](job)
    seconds, tokens, lengths = [], [], []
    for number in range(job["repeats"] + 1):
        started = time.perf_counter()
        lengths = sample()
        if number:  # the first makes what is made once
            seconds.append(time.perf_counter() - started)
            tokens.append(sum(lengths))
    if sys.argv[1] == "megatron":
        from fire_megatron.platform import launch

        launch.stop()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps({"seconds": seconds, "tokens": tokens, "peak_mb": peak, "lengths": sorted(lengths)}))


if __name__ == "__main__":
    main()
