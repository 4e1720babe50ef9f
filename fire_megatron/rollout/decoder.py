"""The device's part of generation: passes of one pipeline stage, and what they leave in tables on the device.

Nothing here reads from the device but :meth:`Decoder.read`. A decode step works on memory that stays where it is, so
that on a GPU it is one CUDA graph for each number of rows and of positions and each way of sampling.

Shapes: S slots, n rows of a decode step (slots 0 to n - 1), C columns of a table, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from fire_megatron.data.packing import pack_rows
from fire_megatron.models.gpt import FireGPT
from fire_megatron.models.kv_cache import KVCache
from fire_megatron.models.packed import packed_seq_params
from fire_megatron.parallel.grid import ModelGrid
from fire_megatron.platform.device import compute_device
from fire_megatron.platform.graphs import Graphs
from fire_megatron.platform.watch import tick
from fire_megatron.rollout.sampler import Sampled, sample_tokens
from fire_megatron.rollout.sampling import Sampling


class Decoder:
    """Slots of one stage: their keys and values, last tokens, and the tokens sampled since the host last looked.

    Every rank of a pipeline calls the same methods in the same order; with experts shared over replicas, so do these
    replicas as far as forward passes go.
    """

    def __init__(self, model: FireGPT, grid: ModelGrid, *, slots: int, max_length: int, columns: int) -> None:
        """Args:
        slots: S.
        max_length: tokens of a row's prompt and response together.
        columns: C, the first for the token after a prompt, the others for decode steps.
        """
        self.model, self.grid = model, grid
        self.cache = KVCache(slots, max_length)
        device = compute_device()
        self._tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        self._numbers = torch.zeros(slots, columns, dtype=torch.float64, device=device)
        self._column = torch.ones(1, dtype=torch.int64, device=device)
        # Token ids, log-probabilities, entropies; all of them exact in float64, so that one transfer brings them.
        self._table = torch.zeros(3, slots, columns, dtype=torch.float64, device=device)
        dtype, hidden = model.config.params_dtype, model.config.hidden_size
        self._received = None if grid.is_first_stage else torch.zeros(1, slots, hidden, dtype=dtype, device=device)
        self._sent = None if grid.is_last_stage else torch.zeros(1, slots, hidden, dtype=dtype, device=device)
        pipeline = dist.get_process_group_ranks(grid.pg.pp)
        self._previous = pipeline[grid.pp_rank - 1]
        self._next = pipeline[(grid.pp_rank + 1) % len(pipeline)]

    @property
    def slots(self) -> int:
        """S."""
        return self.cache.slots

    @property
    def columns(self) -> int:
        """C."""
        return self._numbers.shape[1]

    def weight_addresses(self) -> tuple[int, ...]:
        """Where the weights are."""
        return tuple(tensor.data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers()))

    # ---- between looks ------------------------------------------------------------------------------------------

    def begin(self, numbers: torch.Tensor) -> None:
        """Before the next passes. Args: numbers: [n, C or fewer] float64, what samples each slot's next tokens; the
        first is for a prompt's."""
        self._numbers[: len(numbers), : numbers.shape[1]].copy_(numbers)
        self._column.fill_(1)

    def read(self, rows: int, columns: int) -> np.ndarray:
        """[3, n, columns] float64: ids, log-probabilities and entropies of the tokens sampled since :meth:`begin`; only
        ids on other stages than the last. Waits for the device."""
        return self._table[:, :rows, :columns].cpu().numpy()

    # ---- passes -------------------------------------------------------------------------------------------------

    def prefill(self, prompts: Sequence[torch.Tensor], slots: Sequence[int], sampling: Sampling) -> None:
        """Run prompts as one pack, remember their keys and values in these slots, and sample what follows each."""
        nothing = [torch.zeros(0, dtype=torch.int64)] * len(prompts)
        pack = pack_rows(prompts, nothing, range(len(prompts)), multiple=1, device=compute_device())
        ends = (pack.cu_seqlens[1:].long() - 1).to(compute_device())
        places = torch.tensor(slots).to(compute_device())
        self.cache.begin_prefill(slots, [len(prompt) for prompt in prompts])
        output = self._through_stage(
            partial(self.model, pack.token_ids, pack.position_ids, packed=packed_seq_params(pack), select=ends),
            (pack.token_ids.shape[1], 1),
        )
        if output is not None:
            sampled = self._sample(output, self._numbers[places, 0], sampling)
            self._table[:, places, 0] = _columns(sampled)
            self._tokens.index_copy_(0, places, sampled.tokens)
        new = self._share(self._tokens[places])
        if output is None:
            self._tokens.index_copy_(0, places, new)
            self._table[0, places, 0] = new.double()

    def step(self, rows: int, horizon: int, sampling: Sampling, graphs: Graphs) -> None:
        """One more token for each of the first ``rows`` slots.

        Args:
            rows: n.
            horizon: positions to attend over.
            sampling: how.
            graphs: runs it; told to forget by the caller when :meth:`weight_addresses` change.
        """
        tick()
        if self._received is not None:
            self._exchange(dist.irecv, self._received[:, :rows], self._previous)
        # Temperature and nucleus are constants of the kernels, so a graph is of one setting of them.
        key = (rows, horizon, sampling.temperature, sampling.top_p)
        graphs.run(key, partial(self._compute, rows, horizon, sampling))
        if self._sent is not None:
            self._exchange(dist.isend, self._sent[:, :rows], self._next)
        self._share(self._tokens[:rows])
        if self._sent is not None:
            self._note(self._tokens[None, :rows].double())

    def accompany(self, rows: int, horizon: int) -> None:
        """A pass without effect, for replicas that share experts with this one and have prompts to run."""
        self.cache.begin_decode(rows, horizon)
        self._through_stage(self._model_step(rows), (1, rows))

    def move(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Move rows of at most ``length`` tokens to other slots; see :meth:`KVCache.move`."""
        self.cache.move(sources, targets, length)
        device = compute_device()
        self._tokens[torch.tensor(targets).to(device)] = self._tokens[torch.tensor(sources).to(device)]

    # ---- one stage ----------------------------------------------------------------------------------------------

    def _model_step(self, rows: int) -> partial[torch.Tensor]:
        return partial(self.model, self._tokens[:rows, None], self.cache.lengths[:rows, None])

    def _compute(self, rows: int, horizon: int, sampling: Sampling) -> None:
        """What a step does on this rank, between receiving and sending."""
        self.cache.begin_decode(rows, horizon)
        if self._received is not None:
            self.model.set_input_tensor(self._received[:, :rows])
        output = self._model_step(rows)()
        self.cache.end_decode()
        if self._sent is not None:
            self._sent[:, :rows].copy_(output)
            return
        sampled = self._sample(output, self._numbers[:rows].index_select(1, self._column).squeeze(1), sampling)
        self._tokens[:rows].copy_(sampled.tokens)
        self._note(_columns(sampled))

    def _note(self, values: torch.Tensor) -> None:
        """[k, n] into the next column of the first k parts of the table."""
        parts, rows = values.shape
        self._table[:parts, :rows].index_copy_(2, self._column, values.unsqueeze(2))
        self._column += 1

    def _sample(self, logits: torch.Tensor, numbers: torch.Tensor, sampling: Sampling) -> Sampled:
        return sample_tokens(
            logits,
            numbers,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            vocab_start=self.model.vocab_start,
            group=self.grid.pg.tp,
        )

    def _through_stage(self, forward: partial[torch.Tensor], shape: tuple[int, int]) -> torch.Tensor | None:
        """Receive hidden states of this shape (without H), compute, send; logits on the last stage, else None."""
        tick()
        if self._received is not None:
            hidden = self._received.new_empty(*shape, self._received.shape[2])
            self._exchange(dist.irecv, hidden, self._previous)
            self.model.set_input_tensor(hidden)
        output = forward()
        if self._sent is None:
            return output
        self._exchange(dist.isend, output.contiguous(), self._next)
        return None

    def _exchange(self, operation: object, tensor: torch.Tensor, peer: int) -> None:
        """Send to or receive from a neighbour. As a batch, if of one: on its own, NCCL would make a communicator for
        the two of them, with buffers of its own."""
        for work in dist.batch_isend_irecv([dist.P2POp(operation, tensor, peer, self.grid.pg.pp)]):
            work.wait()

    def _share(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens from the last stage to the others, in place."""
        if self.grid.layout.pipeline > 1:
            dist.broadcast(tokens, src=self.grid.last_stage_rank, group=self.grid.pg.pp)
        return tokens


def _columns(sampled: Sampled) -> torch.Tensor:
    """[3, n] float64."""
    return torch.stack((sampled.tokens.double(), sampled.log_probs.double(), sampled.entropies.double()))
