"""One teacher: a frozen model on its own grid that scores rows.

Shapes: T response tokens of a micro-batch, R_i response tokens of row i, W columns of a state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

from fire_megatron.data.packing import Pack, balance, pack_rows, split_by_tokens, whole_tokens
from fire_megatron.data.rollouts import KeptStates
from fire_megatron.losses.fused import OutputLayer, map_chunks
from fire_megatron.losses.products import sum_dtype
from fire_megatron.losses.topk import top_k
from fire_megatron.losses.vocab_parallel import score_log_prob_and_entropy
from fire_megatron.models.fp8.settings import token_multiple
from fire_megatron.models.gpt import FireGPT
from fire_megatron.models.pipeline import run_pipeline
from fire_megatron.parallel.collectives import all_gather_flat, broadcast_flat
from fire_megatron.parallel.grid import Layout, ModelGrid
from fire_megatron.platform.device import compute_device
from fire_megatron.platform.host import HostMemory
from fire_megatron.platform.offload import Offload
from fire_megatron.teachers.messages import StateKind, pack_topk, split_columns


@dataclass(frozen=True)
class Keep:
    """What to keep of the rows to be scored."""

    row_ids: Sequence[int]
    """Id of each row."""
    slices: int
    """The student's tensor ranks, each of which will get a slice of the columns."""


class ScoredRows(NamedTuple):
    """What a teacher says of rows, in their order."""

    log_probs: list[torch.Tensor]
    """[R_i] float32 on CPU."""
    entropies: list[torch.Tensor]
    """[R_i] float32 on CPU, nats."""
    kept: KeptStates | None


@dataclass(frozen=True)
class TeacherInfo:
    """What every rank of the run knows of a teacher."""

    name: str
    layout: Layout
    hidden: int
    """Hidden size."""
    dtype: torch.dtype
    """Of its hidden states."""
    used_vocab_size: int
    """Entries that its softmax runs over."""
    state_kind: StateKind = field(default_factory=StateKind)
    """What is kept of the tokens for the student."""
    offload: bool = False
    """Whether its weights wait on the host between scorings."""

    @property
    def state_width(self) -> int:
        """W."""
        return {"none": 0, "hidden": self.hidden, "topk": 2 * self.state_kind.k + 1}[self.state_kind.name]

    @property
    def state_dtype(self) -> torch.dtype:
        """Of a state."""
        return self.dtype if self.state_kind.name == "hidden" else torch.int32

    @property
    def state_bytes(self) -> int:
        """Of a token's state."""
        return self.state_width * self.state_dtype.itemsize

    @property
    def logit_bytes(self) -> int:
        """That a token's logits would take."""
        return self.used_vocab_size * sum_dtype(self.dtype).itemsize


class Teacher:
    """This rank's part of a teacher, which scores rows with exact log-probabilities and full-distribution entropies."""

    def __init__(
        self,
        model: FireGPT,
        grid: ModelGrid,
        *,
        micro_batch_tokens: int,
        state_kind: StateKind | None = None,
        offload: Offload | None = None,
    ) -> None:
        """Args: model: this rank's stage, weights loaded; micro_batch_tokens: tokens of a scoring micro-batch;
        state_kind: what is kept of the tokens for the student, nothing by default; offload: where the weights wait
        between scorings."""
        self.grid, self.offload = grid, offload
        self.model = model.eval().requires_grad_(False)
        self.micro_batch_tokens = micro_batch_tokens
        self._memory = HostMemory()
        self.state_kind = state_kind or StateKind()

    @cached_property
    def _output_layer(self) -> OutputLayer:
        return OutputLayer(self.model.output_weight, self.model.used_columns)

    def forget(self) -> None:
        """Take back the memory of all states kept so far, to keep others in it."""
        self._memory.reset()

    def score(
        self,
        prompts: Sequence[torch.Tensor],
        responses: Sequence[torch.Tensor],
        *,
        keep: Keep | None = None,
        loads: list[int] | None = None,
        temperature: float = 1.0,
    ) -> ScoredRows:
        """Score rows; every rank of the teacher's grid passes the same rows and gets the same answer.

        The rows are shared over the data-parallel replicas by token count, so each row is computed once.

        Args:
            prompts: [P_i] int64 token ids of each row.
            responses: [R_i] int64 token ids of each row.
            keep: None keeps nothing. What is kept stays until :meth:`forget`.
            loads: tokens that each replica has had before, of rows that count with these; these are added to them.
            temperature: divides the logits of the log-probabilities; entropies are those of temperature 1.
        """
        lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
        shares = balance(lengths, self.grid.layout.data, loads)
        keep = None if self.state_kind.name == "none" else keep
        slices: dict[int, dict[int, torch.Tensor]] = {}
        mine = self._score_share(prompts, responses, lengths, shares[self.grid.dp_rank], keep, slices, temperature)
        gathered = all_gather_flat(mine, group=self.grid.pg.dp)
        log_probs: list[torch.Tensor] = [torch.empty(0)] * len(lengths)
        entropies: list[torch.Tensor] = [torch.empty(0)] * len(lengths)
        for share, values in zip(shares, gathered, strict=True):
            sizes = [len(responses[row]) for row in share]
            pieces = values.cpu().split(sizes + sizes)  # all log-probs, then all entropies
            for i, row in enumerate(share):
                log_probs[row], entropies[row] = pieces[i], pieces[i + len(share)]
        if keep is None:
            return ScoredRows(log_probs, entropies, None)
        holder = {keep.row_ids[row]: replica for replica, share in enumerate(shares) for row in share}
        return ScoredRows(log_probs, entropies, KeptStates(holder, slices))

    def _score_share(
        self,
        prompts: Sequence[torch.Tensor],
        responses: Sequence[torch.Tensor],
        lengths: Sequence[int],
        share: Sequence[int],
        keep: Keep | None,
        slices: dict[int, dict[int, torch.Tensor]],
        temperature: float,
    ) -> torch.Tensor:
        """This replica's rows through its pipeline: [2 * tokens] float32, log-probs then entropies. The last stage adds
        to ``slices`` what it keeps."""
        tokens = sum(len(responses[row]) for row in share)
        alone = self.grid.pg.ep.size() == 1  # else other replicas may need this one's experts for rows of theirs
        if tokens == 0 and alone:
            return torch.zeros(0, device=compute_device())
        packs = [
            pack_rows(
                prompts,
                responses,
                rows,
                multiple=token_multiple(self.model.config),
                device=compute_device(),
                context=self.grid.layout.context,
                context_rank=self.grid.cp_rank,
            )
            for rows in split_by_tokens(share, lengths, self.micro_batch_tokens) or [[]]
        ]

        def last_stage(hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
            return self._last_stage(hidden, pack, keep, slices, temperature)

        with torch.no_grad():
            results = run_pipeline(self.model, packs, last_stage, grid=self.grid, forward_only=True)
        flat = torch.cat(results, dim=1).flatten() if results else None
        return broadcast_flat(
            flat,
            numel=2 * tokens,
            dtype=torch.float32,
            device=compute_device(),
            src=self.grid.last_stage_rank,
            group=self.grid.pg.pp,
        )

    def _last_stage(
        self,
        hidden: torch.Tensor,
        pack: Pack,
        keep: Keep | None,
        slices: dict[int, dict[int, torch.Tensor]],
        temperature: float,
    ) -> torch.Tensor:
        """[T, H] of this context rank's tokens -> [2, whole T] float32 of the rows, on all context ranks."""
        shard = {"group": self.grid.pg.tp, "vocab_start": self.model.vocab_start}
        kind, context, tops = self.state_kind, self.grid.pg.cp, []

        def score(logits: torch.Tensor, part: slice) -> torch.Tensor:
            if keep is not None and kind.name == "topk":
                tops.append(pack_topk(top_k(logits, kind.k, temperature=kind.temperature, **shard)))
            log_prob, entropy = score_log_prob_and_entropy(logits, pack.targets[part], **shard)
            if temperature != 1:
                log_prob, _ = score_log_prob_and_entropy(logits.mul_(1 / temperature), pack.targets[part], **shard)
            return torch.stack((log_prob, entropy))

        scores = map_chunks(hidden, self._output_layer, score)
        self._output_layer.release()
        if keep is not None:
            states = whole_tokens(hidden if kind.name == "hidden" else torch.cat(tops), pack, group=context)
            if self.grid.cp_rank == 0:  # the one that last_stage_of() names
                self._keep(states, pack, keep, slices)
        return whole_tokens(scores.t(), pack, group=context).t()

    def _keep(self, states: torch.Tensor, pack: Pack, keep: Keep, slices: dict[int, dict[int, torch.Tensor]]) -> None:
        """Add a pack's states [whole T, W] to what is kept, on CPU by row. They are there when :meth:`score` returns,
        which waits for the scores; the pipeline does not wait for them."""
        columns = split_columns(states, keep.slices)
        # Every tensor rank has all of them; each sends its share.
        for slice_ in range(self.grid.tp_rank, keep.slices, self.grid.layout.tensor):
            rows = self._memory.copy(columns[slice_], wait=False).split(list(pack.response_lengths))
            for row, state in zip(pack.rows, rows, strict=True):
                slices.setdefault(keep.row_ids[row], {})[slice_] = state
