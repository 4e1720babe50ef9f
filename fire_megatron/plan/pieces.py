"""Of many equal pieces a few are run, and tell the rest: bytes, operations and operators are linear in their number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fire_megatron.models.gpt import FireGPT
from fire_megatron.plan.trace import Trace

FEW_ROWS = 2
"""Rows of a batch that are really sampled; more of them are more of the same."""
MANY_LAYERS = 8
"""Layers of a stage above which a few stand for all."""


def ceil(number: int, divisor: int) -> int:
    """``number / divisor``, rounded up."""
    return -(-number // divisor)


@dataclass(frozen=True)
class Pieces:
    """A phase over ``rows`` rows, ``size`` in each micro-batch and what is left in a last one.

    A call runs it: its parts are linear in the number of micro-batches, so that a few tell the rest.
    """

    run: Callable[[list[int]], Trace]
    """Runs micro-batches of so many rows each."""
    rows: int
    """Of this replica."""
    size: int

    @property
    def count(self) -> int:
        """Micro-batches."""
        return ceil(self.rows, self.size)

    def first(self) -> Trace:
        """One micro-batch."""
        return self.run([min(self.size, self.rows)])

    def __call__(self) -> Trace:
        """All of them."""
        whole, rest = divmod(self.rows, self.size)
        one = self.first()
        if self.count == 1:
            return one
        two = self.run([self.size] * 2)
        terms = [(whole - 1, two), (2 - whole, one)]
        if rest:  # what it takes less what every run takes, which is 2 one - two
            terms += [(1, self.run([rest])), (1, two), (-2, one)]
        total = Trace.total(*terms)
        if self.count == 2 and rest:
            total.peak = one.peak
        return total


def of_all_layers(model: FireGPT, first: Callable[[], Trace], run: Callable[[], Trace]) -> tuple[Trace, int]:
    """What ``run`` takes of the whole stage. Of layers that are alike, two and three tell the rest (the first one's
    peak is its own).

    Args:
        model: whose stage it is.
        first: a part of ``run``, after which buffers are there that stay.
        run: the phase.

    Returns:
        The phase, and bytes of buffers that its first use leaves behind.
    """
    block, config = model.decoder, model.config
    layers, count = block.layers, len(block.layers)
    in_groups = config.recompute_granularity == "full" and (
        config.recompute_method != "uniform" or config.recompute_num_layers != 1
    )
    few = [count]
    kinds = {(type(layer.mlp), layer.self_attention.core_attention.window) for layer in layers}
    if count > MANY_LAYERS and not in_groups and len(kinds) == 1:
        few = [2, 3]
    traces = []
    try:
        for number in (few[0], *few):
            block.layers, block.num_layers_per_pipeline_rank = layers[:number], number
            traces.append(run() if traces else first())
    finally:
        block.layers, block.num_layers_per_pipeline_rank = layers, count
    begun, less, more = traces[0], traces[1], traces[-1]
    total = Trace.total((count - few[0], more), (1 + few[0] - count, less))
    total.peak = more.peak + (count - few[-1]) * (more.peak - less.peak)
    return total, begun.live - less.live  # what later runs find there
