"""FireGPT: megatron-core's GPTModel with a forward pass for packed rows, cached decoding and partial projection.

Shapes: T tokens of a pack, n rows of a decode step, H hidden size, N selected positions, V local (tensor-parallel)
vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_defaults_if_not_set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import Attention
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint

from fire_megatron.losses import products
from fire_megatron.models.fp8.settings import paused
from fire_megatron.models.kv_cache import KVCache
from fire_megatron.models.layers import CoreAttention
from fire_megatron.models.packed import PackParams
from fire_megatron.models.packed_linear import packed_linears
from fire_megatron.models.rotary_angles import RotaryAngles

if TYPE_CHECKING:
    from fire_megatron.models.fp8.emulation import EmulatedFP8

_SPLIT_DIMENSION = {ColumnParallelLinear: 0, RowParallelLinear: 1, VocabParallelEmbedding: 0}
_OFF_IN_GENERATION = (
    "sequence_parallel",  # a decode step has one token a row: nothing to split
    "reduce_scatter_embeddings",
    "bias_activation_fusion",  # compiled anew for other shapes
    "recompute_mlp",  # there is no backward pass, and megatron-core would still keep the state of random numbers
    "recompute_input_layernorm",
    "recompute_pre_mlp_layernorm",
)


class _Alone:
    """A group of this rank alone, for code that asks its group for nothing but size and rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


class FireGPT(GPTModel):
    """A GPTModel that attends within packed sequences and projects only the positions that are asked for.

    Training and scoring take its final hidden states with :attr:`output_weight` and project them inside the loss
    (``losses/fused.py``); generation takes logits. Columns from :attr:`used_vocab_size` on are vocabulary padding: they
    are left out of the projection, or leave :meth:`forward` as ``-inf``, so that no softmax gives them mass.
    """

    def __init__(self, *args: Any, real_vocab_size: int, rotary_angles: RotaryAngles, **kwargs: Any) -> None:
        """Args beyond GPTModel's.

        real_vocab_size: number of vocabulary entries before padding for tensor parallelism.
        rotary_angles: makes the rotary angles.
        """
        super().__init__(*args, **kwargs)
        self.real_vocab_size = real_vocab_size
        self.used_vocab_size = real_vocab_size
        """Entries that a softmax runs over; fewer where models of a run differ in unused entries at the end."""
        self.rotary_angles = rotary_angles
        self.rotary_pos_emb.inv_freq = rotary_angles.inv_freq
        self.emulated_fp8: EmulatedFP8 | None = None
        """What rounds the products of the layers; None where nothing does."""
        self._cache: KVCache | None = None
        self._mark_tensor_parallel_weights()
        self._leave_context_to_the_core_attention()
        if self.post_process and self.config.sequence_parallel:
            # forward() gathers the sequence itself, selects positions, and lets that gather's backward
            # reduce-scatter; the output layer must then neither gather again nor all-reduce.
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = False
            self.output_layer.disable_grad_reduce = True

    def _mark_tensor_parallel_weights(self) -> None:
        """Tell the optimizer which weights are split over tensor ranks. megatron-core 0.16.1 does so only where it
        initialises them; unmarked, every shard but the first would be left out of the gradient norm."""
        for module in self.modules():
            weight = getattr(module, "weight", None)
            for kind, dimension in _SPLIT_DIMENSION.items():
                if isinstance(module, kind) and weight is not None:
                    set_defaults_if_not_set_tensor_model_parallel_attributes(weight)
                    weight.tensor_model_parallel, weight.partition_dim = True, dimension

    def _leave_context_to_the_core_attention(self) -> None:
        """Hide the context-parallel ranks from megatron-core's attention, which would cut the rotary angles to this
        rank's tokens (``apply_rotary_pos_emb``): ours are of these tokens already, and in generation each rank has rows
        of its own. The core attention has its group from construction."""
        for module in self.modules() if self.pg_collection.cp.size() > 1 else ():
            if isinstance(module, Attention):
                module.pg_collection = copy.copy(module.pg_collection)
                module.pg_collection.cp = _Alone()

    @property
    def vocab_start(self) -> int:
        """First vocabulary entry of this tensor-parallel rank's shard."""
        return self.pg_collection.tp.rank() * (self.vocab_size // self.pg_collection.tp.size())

    @property
    def used_columns(self) -> int:
        """Entries of this rank's vocabulary shard that a softmax runs over."""
        return min(max(self.used_vocab_size - self.vocab_start, 0), self.vocab_size // self.pg_collection.tp.size())

    @property
    def output_weight(self) -> torch.Tensor:
        """[vocabulary shard with padding, H] of the last stage's output layer."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def forward(
        self,
        token_ids: torch.Tensor,
        position_ids: torch.Tensor,
        *,
        packed: PackParams | None = None,
        select: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
        project: bool = True,
    ) -> torch.Tensor:
        """One pass of this pipeline stage.

        Args:
            token_ids: [1, T] a pack of rows, or [n, 1] one new token a row (decode, needs :meth:`cached`).
            position_ids: as token_ids; position of each token within its own row.
            packed: row boundaries of the pack; None in decode.
            select: [N] indices into the pack whose next tokens are wanted; None for all.
            padding: [1, T] bool, tokens that the routers of experts leave out of their losses; None for none.
            project: whether the last stage projects to the vocabulary.

        Returns:
            The stage's hidden states [T or 1, 1 or n, H]; from the last stage :meth:`logits` [N, V], or
            without ``project`` the final hidden states [N, H], the same on every tensor-parallel rank, whose gradient
            is summed over these ranks.
        """
        if padding is not None and self.config.sequence_parallel:
            padding = padding.chunk(self.pg_collection.tp.size(), dim=1)[self.pg_collection.tp.rank()]
        embedded = self.embedding(input_ids=token_ids, position_ids=position_ids) if self.pre_process else None
        by_length = self.rotary_angles.needs_lengths
        if packed is None:
            assert self._cache is not None, "a forward pass without a pack is a decode step and needs a cache"
            positions = position_ids.t().unsqueeze(-1)
            self._cache.rotary = self.rotary_angles(positions, positions + 1 if by_length else None)
        else:
            lengths = packed.token_lengths[:, None] if by_length else None
            packed.rotary, packed.padding = self.rotary_angles(position_ids[0, :, None], lengths), padding
        hidden = self.decoder(
            hidden_states=embedded,
            attention_mask=None,
            rotary_pos_emb=None,  # the core attention rotates
            packed_seq_params=packed,
        )
        if not self.post_process:
            return hidden
        hidden = self._selected(hidden, select)
        if project:
            return self.logits(hidden)
        if self.config.sequence_parallel:
            return hidden  # the gather's backward reduce-scatters
        return copy_to_tensor_model_parallel_region(hidden, group=self.pg_collection.tp)

    def _selected(self, hidden: torch.Tensor, select: torch.Tensor | None) -> torch.Tensor:
        """[T, B, H], or this rank's part of T, -> [N, H]."""
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.pg_collection.tp)
        hidden = hidden.flatten(0, 1)
        return hidden if select is None else hidden[select]

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, H] final hidden states of the last stage -> [N, V] logits of at least float32 without gradient, ``-inf``
        in padding columns."""
        weight = self.output_weight
        if weight.dtype == products.sum_dtype(weight.dtype):
            # By way of the layer, whose product decode steps on a CPU replace (packed_linear.py).
            shared = weight if self.share_embeddings_and_output_weights else None
            logits = self.output_layer(hidden.unsqueeze(1), weight=shared)[0].squeeze(1)
        else:
            logits = products.project(hidden, weight)
        if self.used_columns < logits.shape[-1]:
            logits[:, self.used_columns :] = float("-inf")
        return logits

    def tie_embeddings_and_output_weights_state_dict(
        self,
        sharded_state_dict: dict[str, Any],
        output_layer_weight_key: str,
        first_stage_word_emb_key: str,
        metadata: dict[str, Any],
    ) -> None:
        """As megatron-core's, with the data-parallel rank taken from our group and not from the global state.

        The last stage's copy of a tied embedding is saved under the embedding's key, as a replica of it.
        """
        if not self.post_process or self.pre_process:
            return
        group = metadata["dp_cp_group"]
        sharded_state_dict[output_layer_weight_key] = make_tp_sharded_tensor_for_checkpoint(
            tensor=self.shared_embedding_or_output_weight(),
            key=first_stage_word_emb_key,
            replica_id=(1, 0, group.rank()),
            allow_shape_mismatch=True,
            tp_group=self.pg_collection.tp,
            dp_cp_group=group,
        )

    @contextlib.contextmanager
    def decoding(self, rows: int) -> Iterator[None]:
        """Prepare for many decode steps of about so many rows with unchanging weights, inside :meth:`cached`."""
        layers = [m for m in self.modules() if isinstance(m, ColumnParallelLinear | RowParallelLinear)]
        # Only an output layer that shares the embedding of its own stage has no weight of its own.
        weights = [self.shared_embedding_or_output_weight() if m.weight is None else m.weight for m in layers]
        with packed_linears(list(zip(layers, weights, strict=True)), rows):
            yield

    @contextlib.contextmanager
    def cached(self, cache: KVCache) -> Iterator[None]:
        """Decode with a cache: packs passed meanwhile are prompts to remember. Sequence parallelism and FP8 are off
        inside, since a decode step has one token a row: nothing to split, and no blocks to multiply in; so are
        megatron-core's compiled functions and its recomputation."""
        attentions = [m for m in self.modules() if isinstance(m, CoreAttention)]
        self._cache = cache
        for attention in attentions:
            attention.cache = cache
        switched = [
            (module, name)
            for module in [self.config, *self.modules()]
            for name in _OFF_IN_GENERATION
            if getattr(module, name, False) is True
        ]
        for module, name in switched:
            setattr(module, name, False)
        try:
            emulated = self.emulated_fp8.off() if self.emulated_fp8 else contextlib.nullcontext()
            with paused(self.config), emulated:
                yield
        finally:
            self._cache = None
            for attention in attentions:
                attention.cache = None
            for module, name in switched:
                setattr(module, name, True)
