"""FP8 on a CPU: a model's linear layers compute on rounded values, so that the effect on a loss can be studied.

Which layers: the attention's and the MLP's or experts' column- and row-parallel matrices, as with Transformer Engine;
not the embedding, the output layer and the router. The rounding is exact (torch's own FP8 casts); the speed is not an
FP8 machine's.

With recipe ``delayed`` a tensor's largest magnitude (amax) is reduced over the tensor-, context- and data-parallel
ranks of this pipeline stage of this role (megatron-core's amax group, ``get_amax_reduction_group`` with context
parallelism) once an update, when gradients are final: a point that all of them reach, however many micro-batches each
has had. Transformer Engine does it after every forward and backward pass, which needs replicas in lockstep
(models/fp8/settings.py) and makes a micro-batch's scales depend on those before it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_layer import TransformerLayer

from fire_megatron.config.schema import FP8Config
from fire_megatron.models.fp8.linear import (
    MX,
    OPERANDS,
    Blockwise,
    Delayed,
    EmulatedLinear,
    Operand,
    Rounding,
    Tensorwise,
    format_of,
)
from fire_megatron.models.fp8.quantize import delayed_scale
from fire_megatron.models.packed_linear import Linear
from fire_megatron.platform.device import compute_device

_LOCAL_EXPERT = re.compile(r"(?<=local_experts\.)\d+")
_ROUNDING = {"tensorwise": Tensorwise, "blockwise": Blockwise, "mxfp8": MX}


class Scales:
    """The scales of ``delayed`` for every linear layer of a pipeline stage, and what they come from.

    Alike on all ranks of the stage: layers that only some of them hold (experts) have their rows on all of them. TE
    reduces by place instead, so that there experts of the same place on different ranks share a scale.

    Shapes: M linear layers of the stage; 3 operands of each, as in ``OPERANDS``; h updates remembered.
    """

    def __init__(self, keys: Iterable[str], config: FP8Config) -> None:
        """Args: keys: names of the stage's layers, the same on all its ranks; config: the role's."""
        self.rows = {key: row for row, key in enumerate(sorted(keys))}
        self.config = config
        size, device = (len(self.rows), len(OPERANDS)), compute_device()
        self.scale_M3 = torch.zeros(size, device=device)
        """float32; 0 where no amax has been seen yet."""
        self.history_hM3 = torch.zeros(0, *size, device=device)
        """float32 amaxes of the latest updates, newest first, ``amax_history`` at most."""
        self.pending_M3 = torch.zeros(size, device=device)
        """float32 amaxes of this rank in the update in progress."""

    def scale(self, key: str, operand: Operand) -> torch.Tensor | None:
        """[] float32; None before the first."""
        scale = self.scale_M3[self.rows[key], OPERANDS.index(operand)]
        return scale.clone() if scale else None

    def record(self, key: str, operand: Operand, peak: torch.Tensor) -> None:
        """Take a micro-batch's amax. Taking it twice, as recomputed activations do, is taking it once."""
        place = self.pending_M3[self.rows[key]]
        place[OPERANDS.index(operand)] = torch.maximum(place[OPERANDS.index(operand)], peak)

    def update(self, *, group: dist.ProcessGroup) -> None:
        """End an update: reduce what was recorded and scale by it from the next update on. One all-reduce.

        Args:
            group: the ranks that hold tokens or shards of this stage: tensor x context x data.
        """
        if group.size() > 1:
            dist.all_reduce(self.pending_M3, op=dist.ReduceOp.MAX, group=group)
        self.history_hM3 = torch.cat((self.pending_M3[None], self.history_hM3))[: self.config.amax_history]
        self.pending_M3 = torch.zeros_like(self.pending_M3)
        recent = self.config.amax_algorithm == "most_recent"
        peak_M3 = self.history_hM3[0] if recent else self.history_hM3.amax(dim=0)
        for i, operand in enumerate(OPERANDS):
            fmt = format_of(operand, self.config)
            self.scale_M3[:, i] = delayed_scale(peak_M3[:, i], self.scale_M3[:, i], fmt, margin=self.config.margin)

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """Layer -> its scales [3] and history [h, 3], copies."""
        return {
            key: {"scale": self.scale_M3[row].cpu().clone(), "history": self.history_hM3[:, row].cpu().clone()}
            for key, row in self.rows.items()
        }

    def load(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Continue from :meth:`state` of a model of the same layers in any layout; layers it lacks start over."""
        known = [key for key in self.rows if key in state]
        length = max((len(state[key]["history"]) for key in known), default=0)
        history_hM3 = self.pending_M3.new_zeros(length, *self.pending_M3.shape)
        for key in known:
            saved, row = state[key], self.rows[key]
            self.scale_M3[row] = saved["scale"].to(self.scale_M3.device)
            history_hM3[: len(saved["history"]), row] = saved["history"].to(history_hM3.device)
        self.history_hM3 = history_hM3[: self.config.amax_history]


def _names(name: str, layer: TransformerLayer, ep_rank: int) -> tuple[str, list[str]]:
    """A module's own name, with experts counted over all ranks, and its namesakes' on all ranks of the stage."""
    found = _LOCAL_EXPERT.search(name)
    if found is None:
        return name, [name]
    local = len(layer.mlp.experts.local_experts)
    count = layer.config.num_moe_experts
    own = _LOCAL_EXPERT.sub(str(ep_rank * local + int(found[0])), name)
    return own, [_LOCAL_EXPERT.sub(str(expert), name) for expert in range(count)]


class EmulatedFP8:
    """What makes a model's layers compute in FP8, and remembers for them."""

    def __init__(self, layers: Iterable[TransformerLayer], config: FP8Config, *, num_layers: int, ep_rank: int) -> None:
        """Changes the layers.

        Args:
            layers: of this pipeline stage.
            config: the role's; ``first_last_bf16`` layers at each end of the model stay as they are.
            num_layers: of the whole model.
            ep_rank: place among the ranks that share the experts out.
        """
        kept = config.first_last_bf16
        assert 2 * kept < num_layers
        self.layers: dict[str, Linear] = {}
        """Every layer in FP8 of this rank by its layer's global number from 0 on and its name there."""
        keys: set[str] = set()
        for layer in layers:
            if kept < layer.layer_number <= num_layers - kept:  # counted from 1 over all stages
                for name, module in layer.named_modules(prefix=str(layer.layer_number - 1)):
                    if isinstance(module, Linear):
                        own, namesakes = _names(name, layer, ep_rank)
                        self.layers[own] = module
                        keys.update(namesakes)
        self.scales = Scales(keys, config) if config.recipe == "delayed" else None
        """None with recipes that scale by the values at hand."""
        self.products = {key: EmulatedLinear(self._rounding(key, config)) for key in self.layers}
        """What each of them multiplies by."""
        self._switch(on=True)

    def _rounding(self, key: str, config: FP8Config) -> Rounding:
        if self.scales is None:
            return _ROUNDING[config.recipe](config)
        return Delayed(config, partial(self.scales.scale, key), partial(self.scales.record, key))

    def _switch(self, *, on: bool) -> None:
        for key, layer in self.layers.items():
            if on:
                layer._forward_impl = self.products[key]
            else:
                layer.__dict__.pop("_forward_impl", None)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Within the context the layers compute without rounding."""
        self._switch(on=False)
        try:
            yield
        finally:
            self._switch(on=True)

    def end_update(self, *, group: dist.ProcessGroup) -> None:
        """See :meth:`Scales.update`; nothing, and no communication, where scales are of the moment."""
        if self.scales is not None:
            self.scales.update(group=group)
