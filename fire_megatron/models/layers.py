"""Layers of our own: RMSNorm, the core attention and the gated feed-forward layer.

megatron-core's WrappedTorchNorm refuses sequence parallelism and its local DotProductAttention refuses packed
sequences, so both are replaced; everything else in the model is megatron-core's.

Shapes: T tokens of a pack, S query tokens, n rows of a decode step, G local key/value heads, Q local query heads, D
head dimension.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch.autograd.function import once_differentiable

from fire_megatron import kernels
from fire_megatron.models.kv_cache import KVCache
from fire_megatron.models.packed import PackParams, row_chunks
from fire_megatron.models.rotary import rotate
from fire_megatron.parallel.collectives import gather_with_gradient
from fire_megatron.platform.device import compute_device, device_kind


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm, computed in float32, as Llama's (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4).

    Under sequence parallelism each tensor-parallel rank sees other tokens; the weight carries the
    ``sequence_parallel`` mark by which megatron-core all-reduces its gradient over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        """Args: hidden_size: size of the last dimension; eps: added to the mean square."""
        super().__init__()
        self.eps = eps
        device = "meta" if config.init_model_with_meta_device else compute_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> the same shape and dtype."""
        if x.dtype == torch.float32:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        return F.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype) * self.weight


class CoreAttention(MegatronModule):
    """Causal attention over packed sequences on ``scaled_dot_product_attention``, with an optional KV cache.

    Three inputs, told apart by ``packed_seq_params`` and :attr:`cache`: a pack of sequences (training, scoring),
    a pack of prompts to be remembered (prefill), one token a row (decode). A pack may be a part of longer rows whose
    rest is with the other context-parallel ranks; keys and values are then gathered from all of them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        """Signature of megatron-core's core attentions. Dropout is not supported here."""
        super().__init__(config=config)
        assert not (attention_dropout or config.attention_dropout)
        self.layer_number = layer_number
        self.context_group = pg_collection.cp
        self.tp_group = pg_collection.tp  # MegatronModule.sharded_state_dict looks for it before the global state
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window: int | None = config.window_size[0] + 1 if windowed else None
        self.rotates = not (config.no_rope_freq and config.no_rope_freq[layer_number - 1])
        self.cache: KVCache | None = None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackParams | None = None,
    ) -> torch.Tensor:
        """Packs: query [T, Q, D], key and value [T, G, D] -> [T, Q, D]. Decode: [1, n, Q, D] -> [1, n, Q * D]."""
        if packed_seq_params is None:
            return self._decode(query, key, value)
        query, key = self._rotated(query, key, packed_seq_params.rotary)
        if self.cache is not None:
            self.cache.write_prompts(self.layer_number, key, value)
        return self._attend_pack(query, key, value, packed_seq_params)

    def _rotated(
        self, query: torch.Tensor, key: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Query and key at their positions. megatron-core would compute cosines and sines in every layer, twice."""
        if rotary is None or not self.rotates:
            return query, key
        width = rotary[0].shape[-1]
        if width == query.shape[-1]:
            return rotate(query, rotary), rotate(key, rotary)
        parts = ((x[..., :width], x[..., width:]) for x in (query, key))
        query, key = (torch.cat((rotate(turned, rotary), rest), -1) for turned, rest in parts)
        return query, key

    def _attend_pack(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: PackParams
    ) -> torch.Tensor:
        """Rotated queries of a pack against their own rows."""
        if params.context_ranks > 1:
            return self._attend_in_parts(query, key, value, params)
        offsets: list[int] = params.cu_seqlens_q.tolist()
        rows = [self._attend(query[s:e], key[s:e], value[s:e]) for s, e in itertools.pairwise(offsets)]
        return torch.cat(rows) if len(rows) > 1 else rows[0]

    def _attend_in_parts(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: PackParams
    ) -> torch.Tensor:
        """Each of this rank's chunks against its row up to the chunk's end, the rest of which other ranks hold."""
        both = gather_with_gradient(torch.cat((key, value), -1), group=self.context_group)[params.order]
        keys, values = both.split((key.shape[-1], value.shape[-1]), -1)
        chunks = []
        for own, row, position in row_chunks(params):
            skipped = 0 if self.window is None else max(0, position + 1 - self.window)  # out of the window's reach
            seen = slice(row.start + skipped, row.stop)
            chunks.append(self._attend(query[own], keys[seen], values[seen]))
        return torch.cat(chunks)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Causal attention within one sequence, of whose S tokens the queries are the last: [n, Q, D], [S, G, D] ->
        [n, Q, D]."""
        length, grouped = key.shape[0], query.shape[1] != key.shape[1]
        mask = None
        if len(query) < length or (self.window is not None and length > self.window):
            positions = torch.arange(length, device=query.device)
            distance = positions[length - len(query) :, None] - positions
            mask = distance >= 0
            if self.window is not None:
                mask &= distance < self.window
        if mask is not None and grouped and device_kind(query.device) == "cuda":
            # Of the kernels on a GPU that take a mask and build no plan for each shape, none knows grouped heads.
            copies = query.shape[1] // key.shape[1]
            key, value, grouped = key.repeat_interleave(copies, 1), value.repeat_interleave(copies, 1), False
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=grouped
        )
        return out.squeeze(0).transpose(0, 1)

    def _decode(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """One new token a row against its cache. Query heads of one group share keys, so they stand as queries."""
        assert self.cache is not None, "a forward pass without packed_seq_params is a decode step and needs a cache"
        query, key = self._rotated(query, key, self.cache.rotary)
        _, rows, heads, dim = query.shape
        keys, values = self.cache.append(self.layer_number, key[0], value[0])
        if kernels.usable(query):
            from fire_megatron.kernels.decode_attention import decode_attention

            out = decode_attention(query[0], keys, values, self.cache.at, window=self.window, scale=self.scale)
            return out.view(1, rows, heads * dim)
        q = query[0].reshape(rows, keys.shape[1], heads // keys.shape[1], dim)
        mask = self.cache.mask(self.window, query.dtype)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=self.scale)
        return out.reshape(1, rows, heads * dim)


class SwiGLU(torch.autograd.Function):
    """``silu(gate) * up`` (Shazeer 2020, arXiv 2002.05202), of which nothing but the input is kept for backward."""

    @staticmethod
    def forward(ctx: Any, both: torch.Tensor) -> torch.Tensor:
        """[..., 2 F], gates first, -> [..., F]."""
        both = both.contiguous()
        ctx.save_for_backward(both)
        if kernels.usable(both):
            from fire_megatron.kernels.swiglu import swiglu

            return swiglu(both)
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        """[..., F] -> [..., 2 F]."""
        (both,) = ctx.saved_tensors
        if kernels.usable(both):
            from fire_megatron.kernels.swiglu import swiglu_gradient

            return swiglu_gradient(both, grad.contiguous())
        gate, up = both.chunk(2, dim=-1)
        out = torch.empty_like(both)
        of_gate, of_up = out.chunk(2, dim=-1)
        of_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        torch.mul(grad, F.silu(gate), out=of_up)
        return out


class GatedMLP(MLP):
    """megatron-core's, whose gated activation is one operation. Its own is four, or compiled anew for new shapes."""

    def forward(
        self, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[T, B, H] -> the same, and the bias that is still to be added."""
        if self.config.use_te_activation_func or per_token_scale is not None:
            return super().forward(hidden_states, per_token_scale, **kwargs)
        both, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(SwiGLU.apply(both))
