"""Accuracy of a checkpoint on the held-out problems, sampled by fire_megatron's own engine in this process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.fire_vs_opd.tasks import MAX_NEW_TOKENS, is_right
from fire_megatron.config.schema import StudentConfig
from fire_megatron.data.records import Prompt
from fire_megatron.data.tokenizer import load_tokenizer

TEMPERATURES = {"greedy": 0.0, "sampled": 1.0}
_SEED = 7
_EXAMPLES = 4


def _load(checkpoint: Path) -> tuple[Any, Any]:
    """The model and its grid, on one rank on the CPU."""
    from fire_megatron.checkpoint.loading import load_weights
    from fire_megatron.config.hf_config import read_hf_config
    from fire_megatron.models.build import build_model
    from fire_megatron.parallel.grid import GridFactory, Layout
    from fire_megatron.platform import launch

    world = launch.start("cpu", threads=1)
    role, grid = StudentConfig(checkpoint=str(checkpoint)), GridFactory(timeout=600.0).grid(Layout())
    model = build_model(read_hf_config(checkpoint), role, grid, device=world.device)
    load_weights(model, checkpoint, grid=grid)
    return model, grid


def evaluate(checkpoint: Path, problems: dict[str, list[str]]) -> dict[str, Any]:
    """Sample an answer to every problem, greedily and at temperature 1 with the same random numbers each time.

    Args:
        checkpoint: a converted checkpoint or a step of a run.
        problems: by domain.

    Returns:
        ``accuracy``: by domain and by way of sampling, in 0..1; ``examples``: a few sampled answers of each domain;
        ``seconds``.
    """
    from fire_megatron.platform import launch
    from fire_megatron.rollout.engine import MegatronEngine
    from fire_megatron.rollout.sampling import Sampling

    started = time.perf_counter()
    model, grid = _load(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    rows = [(label, problem) for label, of_label in problems.items() for problem in of_label]
    prompts = [Prompt(i, label, tuple(tokenizer.encode(text)), text) for i, (label, text) in enumerate(rows)]
    accuracy: dict[str, dict[str, float]] = {label: {} for label in problems}
    examples: dict[str, list[str]] = {label: [] for label in problems}
    engine, stop_ids = MegatronEngine(model, grid), frozenset(tokenizer.eos_ids)
    for way, temperature in TEMPERATURES.items():
        sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS, temperature=temperature, seed=_SEED, stop_ids=stop_ids)
        rollouts = engine.generate(prompts, range(len(prompts)), sampling=sampling, step=0)
        right: dict[str, list[bool]] = {label: [] for label in problems}
        for (label, problem), response, cut in zip(rows, rollouts.responses, rollouts.truncated, strict=True):
            text = tokenizer.decode(response.tolist())
            right[label].append(is_right(label, problem, text, truncated=cut))
            if way == "sampled" and len(examples[label]) < _EXAMPLES:
                examples[label].append(f"{problem} {text} {'right' if right[label][-1] else 'wrong'}")
        for label, marks in right.items():
            accuracy[label][way] = sum(marks) / len(marks)
    launch.stop()
    return {"accuracy": accuracy, "examples": examples, "seconds": time.perf_counter() - started}
