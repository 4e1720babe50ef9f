"""A decode step by itself: its operators, its arithmetic, and the memory that a CUDA graph of it keeps."""

from __future__ import annotations

from functools import partial

import torch

from fire_megatron.models.gpt import FireGPT
from fire_megatron.parallel.grid import ModelGrid
from fire_megatron.plan import pieces
from fire_megatron.plan.trace import Trace, Tracing
from fire_megatron.plan.workload import Workload
from fire_megatron.platform.graphs import Graphs
from fire_megatron.rollout.decoder import Decoder
from fire_megatron.rollout.sampling import Sampling


def decode_step(model: FireGPT, grid: ModelGrid, sampling: Sampling, load: Workload, rows: int) -> Trace:
    """One token for each of so many rows; its peak is what it takes besides the cache.

    Args:
        model: this rank's stage of the student.
        grid: the student's.
        sampling: how it samples.
        load: how long rows are.
        rows: n.
    """
    few, longest = min(rows, pieces.FEW_ROWS), load.prompt_tokens + load.response_tokens

    def take(slots: int) -> Trace:
        decoder = Decoder(model, grid, slots=slots, max_length=longest, columns=2)
        with torch.no_grad(), model.cached(decoder.cache):
            step = partial(decoder.step, slots, decoder.cache.max_length, sampling, Graphs(False))
            step()  # takes the cache
            with Tracing() as tracing:
                step()
            return tracing.trace

    was_training = model.training
    model.eval()
    trace = take(few)
    less, more = take(few - 1) if rows > few else trace, rows - few
    model.train(was_training)
    total = Trace.total((1 + more, trace), (-more, less))
    total.operators, total.peak = trace.operators, trace.peak + more * (trace.peak - less.peak)
    return total
