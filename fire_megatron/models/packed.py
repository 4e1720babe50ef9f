"""What the layers know of a pack: where its rows begin, and the whole that it may be a part of.

Shapes: T tokens of this rank's part of a pack.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from fire_megatron.data.packing import Pack
from fire_megatron.platform.host import upload


@dataclass
class PackParams(PackedSeqParams):
    """Boundaries of this rank's tokens, as megatron-core's layers read them, with those of the whole rows beside.

    megatron-core's own fields describe the tokens that this rank holds. Only the core attention knows that they are a
    part of longer rows; everything else works as without context parallelism.
    """

    whole: torch.Tensor | None = None
    """[rows + 1] int32 on CPU, boundaries of the whole rows."""
    whole_on_device: torch.Tensor | None = None
    """The same where the tokens are, for kernels that read it there."""
    longest: int = 0
    """Tokens of the longest whole row."""
    context_ranks: int = 1
    """Ranks that hold a part of each row."""
    context_rank: int = 0
    """Which of them this is."""
    order: torch.Tensor | None = None
    """[whole T] int64: for each token of the whole pack, its place in the ranks' parts laid end to end."""
    real_lengths: tuple[int, ...] = ()
    """Tokens of each row, without padding; without the last row where that is padding alone."""
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    """Cosines and sines [T, 1, D] of this rank's tokens; the model fills them in, once for all of its layers."""
    padding: torch.Tensor | None = None
    """[1, T] bool, tokens that routers leave out of their losses, under sequence parallelism this tensor rank's; the
    model fills it in."""

    @property
    def token_lengths(self) -> torch.Tensor:
        """[T] int64 where the tokens are: the tokens, without padding, of the row that each is of."""
        sizes = self.cu_seqlens_q.diff()
        lengths = torch.tensor([*self.real_lengths, 1])[: len(sizes)].repeat_interleave(sizes)
        return upload([lengths], dtype=torch.int64, device=self.whole_on_device.device)


def packed_seq_params(pack: Pack) -> PackParams:
    """The layers' description of a pack."""
    ranks = pack.context.ranks if pack.context else 1
    local = pack.cu_seqlens if ranks == 1 else pack.cu_seqlens // ranks
    return PackParams(
        qkv_format="thd",
        cu_seqlens_q=local,
        cu_seqlens_kv=local,
        max_seqlen_q=pack.max_seqlen // ranks,
        max_seqlen_kv=pack.max_seqlen // ranks,
        whole=pack.cu_seqlens,
        whole_on_device=upload([pack.cu_seqlens], dtype=torch.int32, device=pack.token_ids.device),
        longest=pack.max_seqlen,
        context_ranks=ranks,
        context_rank=pack.context.rank if pack.context else 0,
        order=pack.context.order if pack.context else None,
        real_lengths=pack.real_lengths,
    )


def row_chunks(params: PackParams) -> list[tuple[slice, slice, int]]:
    """This rank's two chunks of every row, in the order of its tokens, under context parallelism.

    Returns:
        For each chunk: where it is among this rank's tokens, its row in the whole pack up to the chunk's end, and the
        chunk's first position in its row.
    """
    chunks, first, ranks = [], 0, params.context_ranks
    for start, end in itertools.pairwise(params.whole.tolist()):
        size = (end - start) // (2 * ranks)
        for number in (params.context_rank, 2 * ranks - 1 - params.context_rank):
            position = number * size
            chunks.append((slice(first, first + size), slice(start, start + position + size), position))
            first += size
    return chunks
