"""One teacher: a frozen model on its own grid that scores rows.

Shapes: N response tokens of a micro-batch, R_i response tokens of row i.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fire_megatron.data.packing import Pack, balance, pack_rows, split_by_tokens
from fire_megatron.losses.vocab_parallel import score_log_prob_and_entropy
from fire_megatron.models.gpt import FireGPT
from fire_megatron.models.pipeline import run_pipeline
from fire_megatron.parallel.collectives import all_gather_flat, broadcast_flat
from fire_megatron.parallel.grid import ModelGrid
from fire_megatron.platform import compute_device


class Teacher:
    """Scores rows with exact log-probabilities and full-distribution entropies."""

    def __init__(self, name: str, model: FireGPT, grid: ModelGrid, *, micro_batch_tokens: int) -> None:
        """Args: model: this rank's stage, weights loaded; micro_batch_tokens: tokens of a scoring micro-batch."""
        self.name, self.grid = name, grid
        self.model = model.eval().requires_grad_(False)
        self.micro_batch_tokens = micro_batch_tokens

    def score(
        self, prompts: Sequence[torch.Tensor], responses: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Score rows; every rank of the teacher's grid passes the same rows and gets the same answer.

        The rows are shared over the data-parallel replicas by token count, so each row is computed once.

        Args:
            prompts: [P_i] int64 token ids of each row.
            responses: [R_i] int64 token ids of each row.

        Returns:
            log-probabilities and entropies, [R_i] float32 on CPU each, in the rows' order.
        """
        lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
        shares = balance(lengths, self.grid.layout.data)
        mine = self._score_share(prompts, responses, lengths, shares[self.grid.dp_rank])
        gathered = all_gather_flat(mine, group=self.grid.pg.dp)
        log_probs: list[torch.Tensor] = [torch.empty(0)] * len(lengths)
        entropies: list[torch.Tensor] = [torch.empty(0)] * len(lengths)
        for share, values in zip(shares, gathered, strict=True):
            sizes = [len(responses[row]) for row in share]
            pieces = values.cpu().split(sizes + sizes)  # all log-probs, then all entropies
            for i, row in enumerate(share):
                log_probs[row], entropies[row] = pieces[i], pieces[i + len(share)]
        return log_probs, entropies

    def _score_share(
        self,
        prompts: Sequence[torch.Tensor],
        responses: Sequence[torch.Tensor],
        lengths: Sequence[int],
        share: Sequence[int],
    ) -> torch.Tensor:
        """This replica's rows through its pipeline: [2 * tokens] float32, log-probs then entropies."""
        tokens = sum(len(responses[row]) for row in share)
        if tokens == 0:
            return torch.zeros(0, device=compute_device())
        multiple = self.grid.layout.tensor if self.model.config.sequence_parallel else 1
        packs = [
            pack_rows(prompts, responses, rows, multiple=multiple, device=compute_device())
            for rows in split_by_tokens(share, lengths, self.micro_batch_tokens)
        ]
        with torch.no_grad():
            results = run_pipeline(self.model, packs, self._last_stage, grid=self.grid, forward_only=True)
        flat = torch.cat(results, dim=1).flatten() if results else None
        return broadcast_flat(
            flat,
            numel=2 * tokens,
            dtype=torch.float32,
            device=compute_device(),
            src=self.grid.last_stage_rank,
            group=self.grid.pg.pp,
        )

    def _last_stage(self, logits: torch.Tensor, pack: Pack) -> torch.Tensor:
        """[N, local vocabulary] -> [2, N] float32."""
        return torch.stack(
            score_log_prob_and_entropy(logits, pack.targets, group=self.grid.pg.tp, vocab_start=self.model.vocab_start)
        )
