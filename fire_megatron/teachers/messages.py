"""What travels between the student's ranks and a teacher's: requests and answers as flat tensors, and what is sent of
each response token besides its log-probability and entropy, so that the student can form the teacher's distribution.

Shapes: P_i prompt tokens and R_i response tokens of row i; T tokens, H the teacher's hidden size, K of its top-k, W
columns of a state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fire_megatron.config.loss import LossConfig
from fire_megatron.losses.topk import TopK

SCORE_BYTES = 8
"""Log-probability and entropy of a token, float32 each."""


@dataclass(frozen=True)
class Rows:
    """Rows to be scored."""

    ids: list[int]
    prompts: list[torch.Tensor]
    """[P_i] int64."""
    responses: list[torch.Tensor]
    """[R_i] int64."""

    def pack(self) -> torch.Tensor:
        """As one int32 tensor: the number of rows; id, P and R of each; all prompts; all responses."""
        lengths = zip(self.ids, map(len, self.prompts), map(len, self.responses), strict=True)
        head = torch.tensor([len(self.ids), *(n for row in lengths for n in row)], dtype=torch.int64)
        return torch.cat([head, *self.prompts, *self.responses]).to(torch.int32)

    @classmethod
    def unpack(cls, flat: torch.Tensor) -> Rows:
        """The inverse of :meth:`pack`."""
        count = int(flat[0])
        ids, prompts, responses = (flat[1 : 1 + 3 * count].view(-1, 3).t().tolist()) if count else ([], [], [])
        pieces = flat[1 + 3 * count :].long().split(prompts + responses)
        return cls(ids, list(pieces[:count]), list(pieces[count:]))

    @classmethod
    def merged(cls, parts: Sequence[Rows]) -> Rows:
        """All rows in the order of their ids, so that it does not matter who sent which."""
        rows = sorted(
            (row for part in parts for row in zip(part.ids, part.prompts, part.responses, strict=True)),
            key=lambda row: row[0],
        )
        return cls(*([row[i] for row in rows] for i in range(3)))


@dataclass(frozen=True)
class Answer:
    """What a teacher says of the rows of one request, in their order."""

    log_probs: list[torch.Tensor]
    """[R_i] float32."""
    entropies: list[torch.Tensor]
    """[R_i] float32, nats."""
    holders: list[int]
    """The teacher's replica that scored each row."""
    seconds: float
    """That the teacher took for all rows that it scored with these."""

    def pack(self) -> torch.Tensor:
        """As one float32 tensor."""
        return torch.cat([torch.tensor([self.seconds, *self.holders]), *self.log_probs, *self.entropies])

    @classmethod
    def unpack(cls, flat: torch.Tensor, lengths: Sequence[int]) -> Answer:
        """The inverse of :meth:`pack`; lengths: R_i of each row."""
        count = len(lengths)
        pieces = flat[1 + count :].split([*lengths, *lengths])
        holders = [int(holder) for holder in flat[1 : 1 + count].tolist()]
        return cls(list(pieces[:count]), list(pieces[count:]), holders, float(flat[0]))

    @staticmethod
    def size(lengths: Sequence[int]) -> int:
        """Numbers in :meth:`pack` of rows of these lengths."""
        return 1 + len(lengths) + 2 * sum(lengths)


@dataclass(frozen=True)
class StateKind:
    """What is sent.

    ``none``; ``hidden``: final hidden states [T, H] in the teacher's dtype, from which the student's last stage forms
    the teacher's logits with the teacher's output weight; ``topk``: [T, 2K + 1] int32, ids, then the bits of the
    float32 log-probabilities and of that of all other tokens.
    """

    name: str = "none"
    k: int = 0
    temperature: float = 1.0
    """The teacher's, which its top-k log-probabilities have been taken at."""

    @classmethod
    def of(cls, loss: LossConfig) -> StateKind:
        """What an estimator needs."""
        if loss.estimator == "topk":
            return cls("topk", loss.top_k, loss.temperatures[1])
        return cls("hidden" if loss.estimator == "full" else "none")


def split_columns(states: torch.Tensor, parts: int) -> list[torch.Tensor]:
    """[T, W] -> ``parts`` times [T, ceil(W / parts)], the last ones filled up with zeros: one for each of the student's
    tensor ranks, so that nothing is sent twice."""
    width = slice_width(states.shape[-1], parts)
    return list(F.pad(states, (0, parts * width - states.shape[-1])).split(width, dim=-1))


def slice_width(width: int, parts: int) -> int:
    """Columns of each of :func:`split_columns`."""
    return -(-width // parts)


def pack_topk(top: TopK) -> torch.Tensor:
    """[T, 2K + 1] int32."""
    floats = torch.cat((top.log_prob_TK, top.tail_log_prob_T[:, None]), -1).float()
    return torch.cat((top.ids_TK.to(torch.int32), floats.view(torch.int32)), -1)


def unpack_topk(state: torch.Tensor) -> TopK:
    """The inverse of :func:`pack_topk`."""
    k = state.shape[-1] // 2
    floats = state[:, k:].contiguous().view(torch.float32)
    return TopK(state[:, :k].long(), floats[:, :k], floats[:, k])
