"""The in-process generation engine: the student's own megatron model with a KV cache.

No weights are copied: the engine decodes with the modules that train. Prompts of different lengths are
prefilled as one pack and decoded in step, each row at its own positions, so a token's log-probability is the one
that training computes for it. Finished rows leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from fire_megatron.config.schema import RolloutConfig
from fire_megatron.data.packing import pack_rows
from fire_megatron.data.records import Prompt
from fire_megatron.data.rollouts import Rollouts
from fire_megatron.models.gpt import FireGPT
from fire_megatron.models.layers import KVCache
from fire_megatron.models.packed import packed_seq_params
from fire_megatron.parallel.collectives import broadcast_flat, largest
from fire_megatron.parallel.grid import ModelGrid
from fire_megatron.platform import compute_device, tick
from fire_megatron.rollout.sampler import Sampled, sample, uniforms

Progress = Callable[[int], None]
"""Called with the number of tokens sampled since the last call."""
Finished = Callable[[Sequence[int], Sequence[torch.Tensor]], None]
"""Called with row ids and responses ([R_i] int64) of a group of rows that are finished."""


class Engine(Protocol):
    """What a step needs from a rollout engine."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        row_ids: Sequence[int],
        *,
        step: int,
        progress: Progress | None = None,
        finished: Finished | None = None,
        group_size: int = 0,
    ) -> Rollouts:
        """Sample one response for each of this replica's rows."""
        ...


class FinishedRows:
    """Collects finished rows and hands them over in groups of one size, the last one smaller."""

    def __init__(self, hand_over: Finished | None, size: int) -> None:
        """Args: hand_over: None hands nothing over; size: rows of a group, 0 for all at once."""
        self._hand_over, self._size = hand_over, size
        self._rows: list[tuple[int, torch.Tensor]] = []

    def add(self, row_id: int, response: Sequence[int]) -> None:
        """A row has got its last token."""
        if self._hand_over is not None:
            self._rows.append((row_id, torch.tensor(response, dtype=torch.int64)))
            if len(self._rows) == self._size:
                self.close()

    def close(self) -> None:
        """Hand over what is left."""
        if self._rows and self._hand_over is not None:
            rows, self._rows = self._rows, []
            self._hand_over([row for row, _ in rows], [response for _, response in rows])


@dataclass
class _Batch:
    """Rows being decoded together. Lists are by row of the batch; tensors by row still active."""

    prompts: Sequence[torch.Tensor]
    row_ids: Sequence[int]
    responses: list[list[int]]
    log_probs: list[list[float]]
    entropies: list[list[float]]
    finished: list[bool]
    done: FinishedRows


class MegatronEngine:
    """Generates with a megatron model on its own grid; every rank of the grid calls it alike. Replicas that share
    experts decode together, whatever rows each of them has, also none."""

    def __init__(
        self, model: FireGPT, grid: ModelGrid, config: RolloutConfig, *, stop_ids: Sequence[int], seed: int
    ) -> None:
        """Args: model: this rank's stage; stop_ids: tokens that end a response; seed: ``run.seed``."""
        self.model, self.grid, self.config, self.seed = model, grid, config, seed
        self.stop_ids = frozenset(stop_ids)
        pipeline_ranks = dist.get_process_group_ranks(grid.pg.pp)
        self._previous = pipeline_ranks[grid.pp_rank - 1]
        self._next = pipeline_ranks[(grid.pp_rank + 1) % len(pipeline_ranks)]

    def generate(
        self,
        prompts: Sequence[Prompt],
        row_ids: Sequence[int],
        *,
        step: int,
        progress: Progress | None = None,
        finished: Finished | None = None,
        group_size: int = 0,
    ) -> Rollouts:
        """Sample one response a row.

        Args:
            prompts: this replica's rows.
            row_ids: each row's place in the step's global batch; with seed, step and position it fixes the sample.
            step: optimizer step whose weights are sampled.
            progress: told of sampled tokens.
            finished: is given rows as they are finished, on every rank of the replica alike.
            group_size: rows given at a time; 0 gives all of them at the end.

        Returns:
            The same on every rank of the replica.
        """
        was_training = self.model.training
        self.model.eval()
        size = self.config.batch_size or max(len(prompts), 1)
        starts = range(0, len(prompts), size)
        others = largest(len(starts), group=self.grid.pg.ep) - len(starts)
        batches, done = [], FinishedRows(finished, group_size)
        with torch.no_grad():
            for start in starts:
                tokens = [torch.tensor(p.token_ids) for p in prompts[start : start + size]]
                batches.append(self._generate_batch(tokens, row_ids[start : start + size], step, progress, done))
            for _ in range(others):
                self._accompany(step)
        done.close()
        self.model.train(was_training)
        responses = [r for b in batches for r in b.responses]
        log_probs, entropies = self._share_statistics(batches, [len(r) for r in responses])
        return Rollouts(
            row_ids=tuple(row_ids),
            prompts=tuple(prompts),
            responses=tuple(torch.tensor(r, dtype=torch.int64) for r in responses),
            log_probs=log_probs,
            entropies=entropies,
            truncated=tuple(not r or r[-1] not in self.stop_ids for r in responses),
            weight_version=step,
        )

    def _generate_batch(
        self,
        prompts: Sequence[torch.Tensor],
        row_ids: Sequence[int],
        step: int,
        progress: Progress | None,
        done: FinishedRows,
        *,
        ended: bool = False,
    ) -> _Batch:
        rows = len(prompts)
        batch = _Batch(prompts, row_ids, *([[] for _ in range(rows)] for _ in range(3)), [ended] * rows, done)
        cache = KVCache(rows, max(len(p) for p in prompts) + self.config.max_new_tokens)
        with self.model.cached(cache):
            logits = self._prefill(batch, cache)
            with self.model.decoding(rows):
                self._decode_all(batch, cache, logits, step, progress)
        for row in range(rows):
            if not batch.finished[row]:
                done.add(row_ids[row], batch.responses[row])
        return batch

    def _accompany(self, step: int) -> None:
        """Take part in a batch of replicas that share this one's experts: a row that has finished already."""
        self._generate_batch([torch.zeros(1, dtype=torch.int64)], [0], step, None, FinishedRows(None, 0), ended=True)

    def _decode_all(
        self, batch: _Batch, cache: KVCache, logits: torch.Tensor | None, step: int, progress: Progress | None
    ) -> None:
        """From the logits after the prompts to the end of every row."""
        active = list(range(len(batch.prompts)))
        for position in range(self.config.max_new_tokens):
            tokens = self._sample(batch, active, logits, step, position)
            if progress:
                progress(len(active))
            running = [i for i, row in enumerate(active) if not batch.finished[row]]
            # Replicas that share experts decode in step until all of them have finished.
            if not largest(len(running), group=self.grid.pg.ep) or position + 1 == self.config.max_new_tokens:
                break
            # Dropping rows copies the cache, so it waits until it halves the work.
            if 2 * len(running) <= len(active) and len(active) > 1:
                kept = running or [0]  # a row that has finished goes along with other replicas' rows
                keep = torch.tensor(kept, device=tokens.device)
                cache.keep(keep)
                tokens, active = tokens[keep], [active[i] for i in kept]
            logits = self._decode(tokens, cache)

    def _prefill(self, batch: _Batch, cache: KVCache) -> torch.Tensor | None:
        """Run all prompts as one pack; logits after each prompt's last token on the last stage."""
        nothing = [torch.zeros(0, dtype=torch.int64)] * len(batch.prompts)
        pack = pack_rows(batch.prompts, nothing, range(len(batch.prompts)), multiple=1, device=compute_device())
        ends = (pack.cu_seqlens[1:].long() - 1).to(compute_device())
        output = self._stage(pack.token_ids, pack.position_ids, packed=packed_seq_params(pack), select=ends)
        cache.lengths = (pack.cu_seqlens[1:] - pack.cu_seqlens[:-1]).long().to(compute_device())
        return output

    def _decode(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor | None:
        cache.begin_decode()
        output = self._stage(tokens[:, None], cache.lengths[:, None])
        cache.end_decode()
        return output

    def _stage(self, token_ids: torch.Tensor, position_ids: torch.Tensor, **kwargs: object) -> torch.Tensor | None:
        """One pass through the whole pipeline: receive, compute, send. Logits on the last stage, else None."""
        tick()
        if not self.grid.is_first_stage:
            shape = (token_ids.shape[1], token_ids.shape[0], self.model.config.hidden_size)
            hidden = torch.empty(shape, dtype=self.model.config.params_dtype, device=token_ids.device)
            dist.recv(hidden, src=self._previous, group=self.grid.pg.pp)
            self.model.set_input_tensor(hidden)
        output = self.model(token_ids, position_ids, **kwargs)
        if self.grid.is_last_stage:
            return output
        dist.send(output.contiguous(), dst=self._next, group=self.grid.pg.pp)
        return None

    def _sample(
        self, batch: _Batch, active: list[int], logits: torch.Tensor | None, step: int, position: int
    ) -> torch.Tensor:
        """Sample on the last stage, tell the other stages, record; returns the tokens [active]."""
        sampled: Sampled | None = None
        if logits is not None:
            sampled = sample(
                logits,
                uniforms(self.seed, step, [batch.row_ids[row] for row in active], position),
                temperature=self.config.temperature,
                top_p=self.config.top_p,
                vocab_start=self.model.vocab_start,
                group=self.grid.pg.tp,
            )
        tokens = broadcast_flat(
            sampled.tokens if sampled else None,
            numel=len(active),
            dtype=torch.int64,
            device=compute_device(),
            src=self.grid.last_stage_rank,
            group=self.grid.pg.pp,
        )
        statistics = torch.stack((sampled.log_probs, sampled.entropies)).tolist() if sampled else None
        for i, (row, token) in enumerate(zip(active, tokens.tolist(), strict=True)):
            if batch.finished[row]:
                continue
            batch.responses[row].append(token)
            if token in self.stop_ids:
                batch.finished[row] = True
                batch.done.add(batch.row_ids[row], batch.responses[row])
            if statistics is not None:
                batch.log_probs[row].append(statistics[0][i])
                batch.entropies[row].append(statistics[1][i])
        return tokens

    def _share_statistics(
        self, batches: Sequence[_Batch], lengths: Sequence[int]
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Give the last stage's log-probs and entropies to the other stages, cut into rows."""
        flat = None
        if self.grid.is_last_stage:
            columns = ([r for b in batches for r in b.log_probs], [r for b in batches for r in b.entropies])
            values = [value for column in columns for row in column for value in row]
            flat = torch.tensor(values, dtype=torch.float32, device=compute_device())
        total = sum(lengths)
        shared = broadcast_flat(
            flat,
            numel=2 * total,
            dtype=torch.float32,
            device=compute_device(),
            src=self.grid.last_stage_rank,
            group=self.grid.pg.pp,
        ).cpu()
        return shared[:total].split(list(lengths)), shared[total:].split(list(lengths))
