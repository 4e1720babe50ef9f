"""megatron-core's self-attention on more tensor ranks than the model has key/value heads."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer import attention


class SelfAttention(attention.SelfAttention):
    """Ranks that share a key/value head each have the whole of it, and query heads of their own.

    The projection's weights stay split evenly over the ranks; what it makes is gathered, and the gather's backward adds
    up the ranks' gradients. megatron-core 0.19.2 does just that; 0.16.1 asks the global parallel_state for the group.
    """

    def get_query_key_value_tensors(
        self, hidden_states: torch.Tensor, key_value_states: torch.Tensor | None = None, **options: Any
    ) -> Any:
        """[T, B, H] hidden states -> query [T, B, local heads, D], key and value [T, B, local key/value heads, D]."""
        groups, ranks = self.config.num_query_groups, self.tp_group.size()
        if groups >= ranks:
            return super().get_query_key_value_tensors(hidden_states, key_value_states, **options)
        assert options.get("split_qkv", True) and not options.get("output_gate"), options
        mixed = self.linear_qkv(hidden_states)[0]
        mixed = all_gather_last_dim_from_tensor_parallel_region(mixed, group=self.tp_group)
        group, part = divmod(self.tp_group.rank(), ranks // groups)
        queries = self.config.num_attention_heads // groups
        mine = mixed.chunk(groups, -1)[group].unflatten(-1, (queries + 2, -1))
        query, key, value = mine.split((queries, 1, 1), dim=2)
        query = query.chunk(ranks // groups, dim=2)[part]
        if self.q_layernorm is not None:
            query = self.q_layernorm(query)
        if self.k_layernorm is not None:
            key = self.k_layernorm(key)
        return query, key, value
