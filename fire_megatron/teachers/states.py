"""What a teacher sends of each response token, besides its log-probability and entropy, so that the student can form
the teacher's distribution.

Shapes: N tokens, H the teacher's hidden size, K of its top-k, W columns of a state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fire_megatron.config.loss import LossConfig
from fire_megatron.losses.topk import TopK

SCORE_BYTES = 8
"""Log-probability and entropy of a token, float32 each."""


@dataclass(frozen=True)
class StateKind:
    """What is sent.

    ``none``; ``hidden``: final hidden states [N, H] in the teacher's dtype, from which the student's last stage forms
    the teacher's logits with the teacher's output weight; ``topk``: [N, 2K + 1] int32, ids, then the bits of the
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
            return cls("topk", loss.top_k, loss.teacher_temperature)
        return cls("hidden" if loss.estimator == "full" else "none")


def split_columns(states: torch.Tensor, parts: int) -> list[torch.Tensor]:
    """[N, W] -> ``parts`` times [N, ceil(W / parts)], the last ones filled up with zeros: one for each of the student's
    tensor ranks, so that nothing is sent twice."""
    width = slice_width(states.shape[-1], parts)
    return list(F.pad(states, (0, parts * width - states.shape[-1])).split(width, dim=-1))


def slice_width(width: int, parts: int) -> int:
    """Columns of each of :func:`split_columns`."""
    return -(-width // parts)


def pack_topk(top: TopK) -> torch.Tensor:
    """[N, 2K + 1] int32."""
    floats = torch.cat((top.log_prob_TK, top.tail_log_prob_T[:, None]), -1).float()
    return torch.cat((top.ids_TK.to(torch.int32), floats.view(torch.int32)), -1)


def unpack_topk(state: torch.Tensor) -> TopK:
    """The inverse of :func:`pack_topk`."""
    k = state.shape[-1] // 2
    floats = state[:, k:].contiguous().view(torch.float32)
    return TopK(state[:, :k].long(), floats[:, :k], floats[:, k])
