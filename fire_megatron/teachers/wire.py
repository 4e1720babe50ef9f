"""What travels between the student's ranks and a teacher's, as flat tensors.

Shapes: P_i prompt tokens and R_i response tokens of row i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


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
