"""The two layers of our own in the ``local`` spec: RMSNorm and the core attention.

megatron-core's WrappedTorchNorm refuses sequence parallelism and its local DotProductAttention refuses packed
sequences, so both are replaced; everything else in the model is megatron-core's.

Shapes: T tokens of a pack, S query tokens, B rows, G local key/value heads, Q local query heads, D head dimension.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from fire_megatron.models.packed import PackParams, row_chunks
from fire_megatron.parallel.collectives import gather_with_gradient
from fire_megatron.platform import compute_device


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


class KVCache:
    """Keys and values of every layer of one pipeline stage for a batch of rows being decoded.

    Rows have different lengths: each row's next token goes to that row's own position, so a row is computed at
    exactly the positions that it has in training and padding never enters an attention.
    """

    def __init__(self, rows: int, max_length: int) -> None:
        """Args: rows: B; max_length: tokens a row can hold, prompt and response together."""
        self.rows, self.max_length = rows, max_length
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=compute_device())
        """[B] tokens cached so far, not counting the tokens of the forward pass in progress."""
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._mask: torch.Tensor | None = None

    def begin_decode(self) -> None:
        """Prepare one forward pass of one token a row."""
        horizon = int(self.lengths.max()) + 1
        columns = torch.arange(horizon, device=self.lengths.device)
        self._mask = (columns <= self.lengths[:, None])[:, None, None, :]  # [B, 1, 1, horizon]

    def end_decode(self) -> None:
        """Count the token that the forward pass has appended to every row."""
        self.lengths = self.lengths + 1

    def keep(self, rows: torch.Tensor) -> None:
        """Forget all rows but these ([n] int64 indices)."""
        self.rows = len(rows)
        self.lengths = self.lengths[rows]
        for layer in list(self._layers):  # one after the other, so that old and new are never all there
            keys, values = self._layers.pop(layer)
            self._layers[layer] = (keys[rows], values[rows])

    def _buffers(self, layer: int, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if layer not in self._layers:
            shape = (self.rows, key.shape[-2], self.max_length, key.shape[-1])
            self._layers[layer] = (key.new_zeros(shape), key.new_zeros(shape))
        return self._layers[layer]

    def write_prompts(self, layer: int, key: torch.Tensor, value: torch.Tensor, offsets: list[int]) -> None:
        """Store packed prompts: key and value [T, G, D]; row b owns tokens offsets[b] to offsets[b + 1]."""
        keys, values = self._buffers(layer, key)
        for row in range(self.rows):
            start, end = offsets[row], offsets[row + 1]
            keys[row, :, : end - start] = key[start:end].transpose(0, 1)
            values[row, :, : end - start] = value[start:end].transpose(0, 1)

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Store one token a row (key and value [B, G, D]); returns keys, values [B, G, L, D] and mask [B, 1, 1, L]."""
        keys, values = self._buffers(layer, key)
        rows = torch.arange(self.rows, device=key.device)
        keys[rows, :, self.lengths] = key
        values[rows, :, self.lengths] = value
        assert self._mask is not None
        horizon = self._mask.shape[-1]
        return keys[:, :, :horizon], values[:, :, :horizon], self._mask


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
        window = config.window_size
        self.window: int | None = None if window is None else window[0] + 1
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
        """Packs: query [T, Q, D], key and value [T, G, D] -> [T, Q, D]. Decode: [1, B, Q, D] -> [1, B, Q * D]."""
        if packed_seq_params is None:
            return self._decode(query, key, value)
        if packed_seq_params.context_ranks > 1:
            return self._attend_in_parts(query, key, value, packed_seq_params)
        offsets: list[int] = packed_seq_params.cu_seqlens_q.tolist()
        if self.cache is not None:
            self.cache.write_prompts(self.layer_number, key, value, offsets)
        rows = [self._attend(query[s:e], key[s:e], value[s:e]) for s, e in zip(offsets, offsets[1:], strict=False)]
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
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=grouped
        )
        return out.squeeze(0).transpose(0, 1)

    def _decode(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """One new token a row against its cache. Query heads of one group share keys, so they stand as queries."""
        assert self.cache is not None, "a forward pass without packed_seq_params is a decode step and needs a cache"
        _, rows, heads, dim = query.shape
        keys, values, mask = self.cache.append(self.layer_number, key[0], value[0])
        if self.window is not None:
            columns = torch.arange(mask.shape[-1], device=query.device)
            mask = mask & (columns > (self.cache.lengths - self.window)[:, None, None, None])
        q = query[0].view(rows, keys.shape[1], heads // keys.shape[1], dim)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=self.scale)
        return out.reshape(1, rows, heads * dim)
