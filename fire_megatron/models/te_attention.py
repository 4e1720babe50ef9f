"""Transformer Engine's fused attention for packs on a GPU, beside our own for the rest.

Only the ``te`` layer spec imports this module, since importing it imports Transformer Engine.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType

from fire_megatron.models.layers import CoreAttention
from fire_megatron.models.packed import PackParams

_FUSED_DTYPES = (torch.bfloat16, torch.float16)
"""Those that the fused kernels compute in; others would get Transformer Engine's unfused attention, which forms all
scores of a pack at once and knows no context parallelism."""


class TEAttention(CoreAttention):
    """Packs go through Transformer Engine's attention, all rows in one kernel; decode steps, float32, and under context
    parallelism prompts to be remembered, through :class:`CoreAttention`."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **kwargs: Any,
    ) -> None:
        """Signature of megatron-core's core attentions; groups are taken from ``pg_collection`` alone."""
        super().__init__(config, layer_number, attn_mask_type, attention_type, pg_collection=pg_collection, **kwargs)
        # Keys and values go round in a ring, whose steps the computation hides; a ring knows no sliding window.
        communication = cp_comm_type or ("p2p" if self.window is None else "all_gather")
        self.fused = TEDotProductAttention(
            config,
            layer_number,
            attn_mask_type,
            attention_type,
            softmax_scale=self.scale,
            cp_comm_type=communication,
            pg_collection=pg_collection,
        )

    def _attend_pack(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: PackParams
    ) -> torch.Tensor:
        """As :meth:`CoreAttention._attend_pack`; the fused attention returns [T, Q * D]. It is built for packs that all
        context ranks share; in generation each of them has prompts of its own."""
        if query.dtype not in _FUSED_DTYPES or params.context_ranks != self.context_group.size():
            return super()._attend_pack(query, key, value, params)
        return self.fused(
            query,
            key,
            value,
            attention_mask=None,
            attn_mask_type=AttnMaskType.causal,
            packed_seq_params=fused_params(params),
        )


def fused_params(params: PackParams) -> PackedSeqParams:
    """What Transformer Engine reads of a pack: boundaries and lengths of whole rows, also where a rank has a part.

    The padding at a row's end counts as a part of the row: causal attention keeps it from all tokens before it, and
    the kernels for padding between rows are fewer. That there is none shows in both boundaries being one tensor.
    """
    starts = params.whole_on_device
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        cu_seqlens_q_padded=starts,
        cu_seqlens_kv_padded=starts,
        max_seqlen_q=params.longest,
        max_seqlen_kv=params.longest,
    )
