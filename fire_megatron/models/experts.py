"""Mixture of experts: megatron-core's layers with a router whose auxiliary losses are means over an update's tokens.

Shapes: N tokens of a micro-batch on this rank, E experts, L layers of this stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec

from fire_megatron.config.hf_config import ModelShape
from fire_megatron.data.packing import Pack
from fire_megatron.metrics.values import Mean, Value
from fire_megatron.platform.device import compute_device

if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None  # 0.16.1 asks for it by name, also where Transformer Engine is not installed


def expert_settings(shape: ModelShape, *, spec: str) -> dict[str, Any]:
    """TransformerConfig's fields for a model's experts; none for a dense model.

    Args:
        shape: the architecture.
        spec: ``local`` or ``te``.
    """
    if shape.experts is None:
        return {}
    return {
        "num_moe_experts": shape.experts.count,
        "moe_layer_freq": [int(shape.has_experts(layer)) for layer in range(shape.num_layers)],
        "moe_ffn_hidden_size": shape.experts.ffn,
        "moe_router_topk": shape.experts.top_k,
        # A softmax over the chosen logits is the softmax over all of them, divided by its sum over the chosen.
        "moe_router_pre_softmax": not shape.experts.normalised,
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": spec == "te",
    }


class Router(TopKRouter):
    """megatron-core's top-k router, with auxiliary losses that are token means over the whole update.

    megatron-core's own scale with the count of local tokens and rely on gradients being divided by the global count
    afterwards. Here the loss has been divided already (losses/reduction.py), replicas may run different numbers of
    micro-batches, and packs may hold padding. So a micro-batch's auxiliary loss is weighted with its share of the
    update's tokens, padding left out: the same sum in any layout.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As megatron-core's, with the weight on the compute device from the start."""
        super().__init__(*args, **kwargs)
        if not self.config.init_model_with_meta_device:
            weight = torch.nn.Parameter(self.weight.detach().to(compute_device()))
            weight.__dict__.update(self.weight.__dict__)  # megatron-core's marks, such as sequence_parallel
            self.weight = weight
        self.begin(1.0)

    def begin(self, tokens: float) -> None:
        """Start an update over this many tokens on all replicas; forgets the last one's statistics."""
        self.update_tokens = tokens
        self.load_E = torch.zeros(self.num_experts, device=compute_device())
        """Tokens of this rank that went to each expert, padding left out."""
        self.sums: dict[str, torch.Tensor] = {}
        """This rank's part of each auxiliary loss, summed over tokens, without its coefficient."""

    def _attach(self, name: str, coefficient: float, part: torch.Tensor, activation: torch.Tensor) -> torch.Tensor:
        """``activation`` unchanged, with the gradient of the auxiliary loss tied to its backward pass."""
        self.sums[name] = self.sums.get(name, 0.0) + part.detach()
        return MoEAuxLossAutoScaler.apply(activation, coefficient * part / self.update_tokens)

    def _apply_aux_loss(
        self, probs: torch.Tensor, scores_NE: torch.Tensor, chosen_NE: torch.Tensor, with_padding_mask: bool = False
    ) -> torch.Tensor:
        """Switch's load-balancing loss (arXiv 2101.03961, eq. 4) of a micro-batch, which tensor- and context-parallel
        ranks share: E / (k T^2) sum_e load_e sum_t score_te, times its T tokens. Padding has neither load nor score."""
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if coefficient == 0:
            return probs
        load_E = chosen_NE.sum(dim=0).float()
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(load_E, group=self.tp_cp_group)
        slots = load_E.sum().clamp(min=1.0)  # k T; none in a pack of padding
        part = self.num_experts * (scores_NE.sum(dim=0) * load_E).sum() / slots
        return self._attach("aux_loss", coefficient, part, probs)

    def apply_z_loss(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """ST-MoE's router z-loss (arXiv 2202.08906, eq. 5): the mean squared logsumexp of a token's logits."""
        coefficient = self.config.moe_z_loss_coeff
        if not coefficient or not self.training or not torch.is_grad_enabled():
            return logits
        squares_N = logits.float().logsumexp(dim=-1).square()
        if padding_mask is not None:
            squares_N = squares_N.masked_fill(padding_mask, 0.0)
        return self._attach("z_loss", coefficient, squares_N.sum(), logits)

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As megatron-core's; in training, counts where the tokens go."""
        probs, chosen_NE = super().routing(logits, padding_mask=padding_mask)
        if self.training and torch.is_grad_enabled():
            real_NE = chosen_NE if padding_mask is None else chosen_NE & ~padding_mask.reshape(-1, 1)
            self.load_E += real_NE.sum(dim=0)
        return probs, chosen_NE


def use_router(layer: ModuleSpec) -> None:
    """Put :class:`Router` into a transformer layer's spec with experts (a ModuleSpec, from 0.19 on a partial)."""
    mlp = layer.submodules.mlp
    submodules = mlp.submodules if isinstance(mlp, ModuleSpec) else mlp.keywords["submodules"]
    assert isinstance(submodules, MoESubmodules)
    submodules.router = Router


def pass_padding(layer: torch.nn.Module) -> None:
    """Let a transformer layer with experts take the mask of padding from the pack. With ``recompute_method: block``
    megatron-core 0.16.1 hands it to the layers that are recomputed and not to the others."""

    def from_the_pack(_: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        packed = kwargs["packed_seq_params"]
        return args, kwargs | {"padding_mask": packed and packed.padding}

    layer.register_forward_pre_hook(from_the_pack, with_kwargs=True)


def _routers(model: torch.nn.Module) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def begin_update(model: torch.nn.Module, packs: Sequence[Pack], *, group: dist.ProcessGroup) -> None:
    """Tell a model's routers the tokens of an update. Collective over ``group`` where the model has experts.

    Args:
        model: this rank's stage.
        packs: this replica's micro-batches.
        group: the data-parallel ranks.
    """
    routers = _routers(model)
    if not routers:
        return
    tokens = torch.tensor(float(sum(sum(pack.real_lengths) for pack in packs)), device=compute_device())
    if group.size() > 1:
        dist.all_reduce(tokens, group=group)
    for router in routers:
        router.begin(max(tokens.item(), 1.0))


def router_metrics(model: torch.nn.Module, *, group: dist.ProcessGroup) -> dict[str, Value]:
    """What the routers saw since :func:`begin_update`: ``moe/max_load`` and each auxiliary loss that is on, without
    its coefficient, as means over tokens and layers. Collective over ``group`` where the model has experts.

    Args:
        model: this rank's stage.
        group: the ranks that hold tokens of this stage: tensor x data x context.

    Returns:
        This rank's part, to be reduced over all ranks of the model.
    """
    routers = _routers(model)
    if not routers:
        return {}
    load_LE = torch.stack([router.load_E for router in routers])
    tokens = load_LE.sum() / routers[0].topk
    sums = {name: sum(router.sums[name] for router in routers) for name in routers[0].sums}
    if group.size() > 1:
        dist.all_reduce(load_LE, group=group)
    fullest = (load_LE.max(dim=1).values / load_LE.mean(dim=1).clamp(min=1e-9)).sum()
    count, peak, *parts = torch.stack([tokens, fullest, *sums.values()]).tolist()  # one wait for the device
    metrics: dict[str, Value] = {f"moe/{name}": Mean(part, count) for name, part in zip(sums, parts, strict=True)}
    if group.rank() == 0:
        metrics["moe/max_load"] = Mean(peak, len(routers))
    return metrics
