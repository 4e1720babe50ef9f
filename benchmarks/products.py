"""Seconds of the matrix products that a distillation step cannot do without, at this machine's own speed in float32.

What benchmarks/step.py holds each phase against: the products of all weights, at the shapes that the phase has them in,
one after the other and nothing else. Attention's own products, norms and sampling are not among them.

Shapes: M rows of an activation, [N, K] a weight.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Weights = list[tuple[int, int]]


def _shapes(folder: Path) -> tuple[Weights, tuple[int, int], int]:
    """[N, K] of a layer's weights and of the output layer, and the number of layers, of a dense model."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    groups, width = config.num_key_value_heads, config.intermediate_size
    layer = [((heads + 2 * groups) * head, hidden), (hidden, heads * head), (2 * width, hidden), (hidden, width)]
    return layer, (config.vocab_size, hidden), config.num_hidden_layers


def _best(run: Callable[[], Any], repeats: int = 5) -> float:
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def _product(rows: int, shape: tuple[int, int], *, directions: int = 1, copies: int = 1) -> float:
    """Of an activation [M, K] with a weight, forward alone or with the two gradients.

    Args:
        copies: weights taken in turn, so that none is still in a cache.
    """
    weights = [torch.randn(shape) for _ in range(copies)]
    x, grad = torch.randn(rows, shape[1]), torch.randn(rows, shape[0])

    def run() -> None:
        for weight in weights:
            torch.mm(x, weight.t())
            if directions == 3:
                torch.mm(grad, weight)
                torch.mm(grad.t(), x)

    return _best(run) / copies


def _decode_product(rows: int, shape: tuple[int, int], copies: int) -> float:
    """As decode steps multiply: by weights in oneDNN's layout, which are read from memory each time."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return _product(rows, shape, copies=copies)
    weights = [torch.ops.mkldnn._reorder_linear_weight(torch.randn(shape), rows) for _ in range(copies)]
    x = torch.randn(rows, shape[1])
    run = torch.ops.mkldnn._linear_pointwise
    return _best(lambda: [run(x, weight, None, "none", [], "") for weight in weights]) / copies


def phase_seconds(
    student: Path, teacher: Path, *, rollouts: int, prompt_tokens: int, new_tokens: int, micro_batch_size: int
) -> dict[str, float]:
    """Of ``rollout``, ``teacher`` and ``update`` of a step, with rows of one length.

    Args:
        student: Hugging Face folder.
        teacher: Hugging Face folder.
        rollouts: rows.
        prompt_tokens: of a row.
        new_tokens: of a row; only their positions are projected to the vocabulary.
        micro_batch_size: rows of a pass of the update.
    """
    row = prompt_tokens + new_tokens

    def forward(model: Path, rows: int, projected: int, directions: int = 1) -> float:
        layer, output, count = _shapes(model)
        body = sum(_product(rows, shape, directions=directions) for shape in layer)
        return count * body + _product(projected, output, directions=directions)

    layer, output, count = _shapes(student)
    step = count * sum(_decode_product(rollouts, shape, copies=8) for shape in layer)
    step += _decode_product(rollouts, output, copies=1)
    passes = rollouts / micro_batch_size
    return {
        "rollout": forward(student, rollouts * prompt_tokens, rollouts) + (new_tokens - 1) * step,
        "teacher": forward(teacher, rollouts * row, rollouts * new_tokens),
        "update": passes * forward(student, micro_batch_size * row, micro_batch_size * new_tokens, 3),
    }
