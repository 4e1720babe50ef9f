"""The in-process generation engine: the student's own megatron model with a KV cache.

No weights are copied: the engine decodes with the modules that train. Rows go through a bounded number of slots
(``Sampling.batch_size``): the prompts of those that are admitted run as one pack, all slots decode together, and a row
that ends makes room for one that waits. Each row is at its own positions, so a token's log-probability is the one that
training computes for it, whatever company the row is in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from fire_megatron.data.packing import split_by_tokens
from fire_megatron.data.records import Prompt
from fire_megatron.data.rollouts import Rollouts
from fire_megatron.models.gpt import FireGPT
from fire_megatron.models.kv_cache import length_bucket
from fire_megatron.parallel.collectives import broadcast_flat, largest
from fire_megatron.parallel.grid import ModelGrid
from fire_megatron.platform.device import compute_device, device_kind
from fire_megatron.platform.graphs import Graphs
from fire_megatron.rollout.decoder import Decoder
from fire_megatron.rollout.finished import Finished, FinishedRows
from fire_megatron.rollout.sampler import uniforms
from fire_megatron.rollout.sampling import Sampling
from fire_megatron.rollout.slots import FinishedRow, Slots

Progress = Callable[[int], None]
"""Called with the number of tokens sampled since the last call."""

_PREFILL_TOKENS = 16384
"""Tokens of prompts in one forward pass, unless a single prompt is longer."""
SYNC_EVERY = {"cpu": 1, "cuda": 16}
"""Decode steps between two looks at what has been sampled. A look makes the device wait for the host, which costs a CPU
nothing; without one, rows that have ended go on."""


def row_bucket(rows: int, kind: str) -> int:
    """Rows of a decode step for so many that count: on a GPU a few numbers, each of them a CUDA graph, where rows cost
    little beside the weights; on a CPU just these."""
    if kind == "cpu" or rows <= 1:
        return max(rows, 1)
    power = 1 << (rows - 1).bit_length()
    step = max(8, power // 8)
    return power if rows <= 8 else -(-rows // step) * step


def uses_graphs(wanted: bool, model: FireGPT, *, on_gpu: bool) -> bool:
    """Whether decode steps are CUDA graphs. With experts they are not: their dispatcher counts tokens on the host."""
    return on_gpu and wanted and not model.config.num_moe_experts


class MegatronEngine:
    """Generates with a megatron model on its own grid, in whatever ways of sampling; every rank of the grid calls it
    alike. Replicas that share experts decode together, whatever rows each of them has, also none."""

    def __init__(
        self,
        model: FireGPT,
        grid: ModelGrid,
        *,
        sync_every: int = 0,
        cuda_graphs: bool = True,
        keep_cache: bool = False,
    ) -> None:
        """Args:
        model: this rank's stage.
        sync_every: decode steps between two looks at what has been sampled; 0 picks.
        cuda_graphs: whether decode steps are CUDA graphs where they can be.
        keep_cache: keep the memory for keys and values from one call to the next, and with it CUDA graphs.
        """
        self.model, self.grid, self.keep_cache = model, grid, keep_cache
        self._kind = device_kind(compute_device())
        self.sync_every = sync_every or SYNC_EVERY[self._kind]
        self.graphs = Graphs(uses_graphs(cuda_graphs, model, on_gpu=compute_device().type == "cuda"))
        self.weight_version = 0
        self._decoder: Decoder | None = None
        self._addresses: tuple[int, ...] = ()

    def publish(self, version: int) -> None:
        """Take note that the model's weights are those after so many steps. None is copied: they are what trains."""
        self.weight_version = version

    def generate(
        self,
        prompts: Sequence[Prompt],
        row_ids: Sequence[int],
        *,
        sampling: Sampling,
        step: int,
        progress: Progress | None = None,
        finished: Finished | None = None,
        group_size: int = 0,
    ) -> Rollouts:
        """Sample one response a row.

        Args:
            prompts: this replica's rows.
            row_ids: each row's place in the step's global batch; with seed, step and position it fixes the sample.
            sampling: how; it may differ from call to call.
            step: of the run; with it come other samples.
            progress: told of sampled tokens.
            finished: is given rows as they are finished, on every rank of the replica alike.
            group_size: rows given at a time; 0 gives all of them at the end.

        Returns:
            The same on every rank of the replica.
        """
        answers: list[FinishedRow] = []
        done = FinishedRows(finished, group_size)

        def take(tokens: int, new: list[FinishedRow]) -> None:
            for answer in new:
                done.add(row_ids[answer.row], answer.tokens)
            answers.extend(new)
            if progress:
                progress(tokens)

        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                self._decode_all([torch.tensor(p.token_ids) for p in prompts], row_ids, sampling, step, take)
        finally:
            self.model.train(was_training)
            if not self.keep_cache:
                self.release()
        done.close()
        answers.sort(key=lambda answer: answer.row)
        responses = tuple(answer.tokens for answer in answers)
        log_probs, entropies = self._share_statistics(answers)
        return Rollouts(
            row_ids=tuple(row_ids),
            prompts=tuple(prompts),
            responses=responses,
            log_probs=log_probs,
            entropies=entropies,
            truncated=tuple(not len(r) or int(r[-1]) not in sampling.stop_ids for r in responses),
            weight_version=self.weight_version,
        )

    def release(self) -> None:
        """Give back the memory for keys and values, and the graphs that work on it; the next call makes them again."""
        self._decoder = None
        self.graphs.forget()

    def _decode_all(
        self,
        prompts: Sequence[torch.Tensor],
        row_ids: Sequence[int],
        sampling: Sampling,
        step: int,
        take: Callable[[int, list[FinishedRow]], None],
    ) -> None:
        """All rows, from the first prompt to the last token."""
        lengths = [len(prompt) for prompt in prompts]
        most, every = sampling.max_new_tokens, min(self.sync_every, sampling.max_new_tokens)
        size = max(1, min(sampling.batch_size or len(prompts), len(prompts)))
        decoder = self._ready(size, max(lengths, default=1) + most, every + 1)
        slots = Slots(lengths, size, max_new_tokens=most, stop_ids=sampling.stop_ids, columns=every + 1)
        ids = np.array([*row_ids, 0], dtype=np.int64)  # -1, for no row, takes the last
        with self.model.cached(decoder.cache), self.model.decoding(size):
            while True:
                admitted = slots.admit()
                parts = split_by_tokens(range(len(admitted)), [lengths[row] for _, row in admitted], _PREFILL_TOKENS)
                # Forward passes that are due, the most of any replica that shares this one's experts.
                packs, steps = largest(len(parts), slots.steps(every), group=self.grid.pg.ep)
                if packs == steps == 0:
                    break
                rows = min(row_bucket(slots.span, self._kind), size)
                horizon = min(length_bucket(slots.cached(steps) + 1, compute_device()), decoder.cache.max_length)
                decoder.begin(uniforms(sampling.seed, step, ids[slots.row[:rows]], slots.places(rows, steps + 1)))
                for number in range(packs):
                    if number < len(parts):
                        chosen = [admitted[i] for i in parts[number]]
                        packed, places = [prompts[row] for _, row in chosen], [slot for slot, _ in chosen]
                        decoder.prefill(packed, places, sampling)
                    else:
                        decoder.accompany(rows, horizon)
                for _ in range(steps):
                    decoder.step(rows, horizon, sampling, self.graphs)
                take(*slots.take(decoder.read(rows, steps + 1), [slot for slot, _ in admitted]))
                if not slots.waiting and row_bucket(slots.busy, self._kind) < rows:
                    sources, targets = slots.compact()
                    if sources:
                        decoder.move(sources, targets, slots.cached(0))

    def _ready(self, slots: int, length: int, columns: int) -> Decoder:
        """Memory for so many rows of up to ``length`` tokens: what there is, if it is enough, else this and no more,
        whatever other samplings have needed."""
        have = self._decoder
        if have is None or have.slots < slots or have.cache.max_length < length or have.columns < columns:
            have = None
            self.release()  # before more is asked for
            self._decoder = have = Decoder(self.model, self.grid, slots=slots, max_length=length, columns=columns)
        # An update changes weights in place; coming back from the host, they may be elsewhere.
        addresses = have.weight_addresses()
        if addresses != self._addresses:
            self.graphs.forget()
        self._addresses = addresses
        return have

    def _share_statistics(
        self, answers: Sequence[FinishedRow]
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Log-probabilities and entropies of each row; the last stage gives them to the other stages."""
        lengths = [len(answer.tokens) for answer in answers]
        flat = torch.cat([torch.zeros(2, 0), *(answer.statistics for answer in answers)], 1)
        if self.grid.layout.pipeline > 1:
            flat = broadcast_flat(
                flat.flatten().to(compute_device()),
                numel=2 * sum(lengths),
                dtype=torch.float32,
                device=compute_device(),
                src=self.grid.last_stage_rank,
                group=self.grid.pg.pp,
            ).cpu()
        log_probs, entropies = flat.view(2, -1)
        return log_probs.split(lengths), entropies.split(lengths)
