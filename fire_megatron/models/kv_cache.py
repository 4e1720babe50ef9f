"""Keys and values of rows that are being decoded, in slots that rows take and leave.

Shapes: S slots, n rows of a decode step (slots 0 to n - 1), T tokens of a pack, G local key/value heads, D head
dimension, L positions of a slot.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fire_megatron import kernels
from fire_megatron.platform.device import compute_device, device_kind

_SMALLEST_BUCKET = {"cpu": 16, "cuda": 64}
"""Positions: few shapes where each costs something (CUDA graphs, kernels' plans), little waste where none does."""


def length_bucket(length: int, device: torch.device) -> int:
    """Positions to attend over for rows of up to ``length``: rounded up, to four sizes for each doubling of it."""
    smallest = _SMALLEST_BUCKET.get(device_kind(device), _SMALLEST_BUCKET["cuda"])
    step = max(smallest, 2 ** ((length - 1).bit_length() - 3) if length > 1 else 1)
    return -(-length // step) * step


class KVCache:
    """Keys and values of every layer of one pipeline stage.

    Memory is taken once, for all slots at their full length, and stays where it is: a decode step reads and writes the
    same addresses every time, which is what a CUDA graph needs. Rows have different lengths: each row's next token
    goes to that row's own position, so a row is computed at exactly the positions that it has in training and padding
    never enters an attention.
    """

    def __init__(self, slots: int, max_length: int) -> None:
        """Args: slots: S; max_length: tokens that a slot has to hold, prompt and response together."""
        device = compute_device()
        self.slots, self.max_length = slots, length_bucket(max_length, device)
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=device)
        """[S] tokens of each slot, not counting those of the forward pass in progress. Changed in place."""
        self.rotary: tuple[torch.Tensor, torch.Tensor] | None = None
        """Cosines and sines of the positions of the decode step in progress."""
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._places: tuple[torch.Tensor, torch.Tensor] | None = None
        self._horizon = 0
        self._masks: dict[tuple[int | None, torch.dtype], torch.Tensor] = {}

    # ---- what layers ask ----------------------------------------------------------------------------------------

    def write_prompts(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store the pack that :meth:`begin_prefill` told of: key and value [T, G, D]."""
        assert self._places is not None, "begin_prefill() comes first"
        self._write(layer, key, value)

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one token a row (key and value [n, G, D]); returns keys and values [n, G, horizon, D]."""
        if kernels.usable(key):
            from fire_megatron.kernels.decode_attention import append

            keys, values = self._memory(layer, key)
            append(keys, values, key, value, self.at)
        else:
            keys, values = self._write(layer, key, value)
        rows = slice(0, len(key))
        return keys[rows, :, : self._horizon], values[rows, :, : self._horizon]

    @property
    def at(self) -> torch.Tensor:
        """[n] int64, the position of each row's token of the decode step in progress."""
        assert self._places is not None, "begin_decode() comes first"
        return self._places[1]

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """[n, 1, 1, horizon] what is added to scores: 0 where a row's token may look, else ``-inf``. Made once a step.

        Args:
            window: tokens that it may look back on, itself included; None for all.
            dtype: of the scores.
        """
        if (window, dtype) not in self._masks:
            at = self.at[:, None]
            columns = torch.arange(self._horizon, device=at.device)
            seen = columns <= at
            if window is not None:
                seen &= columns > at - window
            mask = torch.zeros(seen.shape, dtype=dtype, device=at.device).masked_fill_(~seen, -torch.inf)
            self._masks[window, dtype] = mask[:, None, None]
        return self._masks[window, dtype]

    def _memory(self, layer: int, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if layer not in self._layers:
            shape = (self.slots, key.shape[-2], self.max_length, key.shape[-1])
            # Zeros, since a mask keeps out finite numbers only.
            self._layers[layer] = (key.new_zeros(shape), key.new_zeros(shape))
        return self._layers[layer]

    def _write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._memory(layer, key)
        assert self._places is not None
        slots, positions = self._places
        keys[slots, :, positions] = key
        values[slots, :, positions] = value
        return keys, values

    # ---- what the engine says -----------------------------------------------------------------------------------

    def begin_prefill(self, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """The next forward pass is of a pack of prompts, which move into these slots.

        Args:
            slots: where each prompt goes, in the order of the pack; all different.
            lengths: tokens of each.
        """
        sizes = torch.tensor(lengths)
        places = torch.tensor(slots).repeat_interleave(sizes), torch.cat([torch.arange(n) for n in lengths])
        device = self.lengths.device
        self._places = places[0].to(device), places[1].to(device)
        self.lengths.index_copy_(0, torch.tensor(slots).to(device), sizes.to(device))

    def begin_decode(self, rows: int, horizon: int) -> None:
        """The next forward pass is of one token of each of the first ``rows`` slots.

        Args:
            rows: n.
            horizon: positions to attend over, more than the tokens of any row that counts.
        """
        assert horizon <= self.max_length, (horizon, self.max_length)
        # A row that has ended continues until the host looks; its last position is as good as any.
        at = self.lengths[:rows].clamp(max=horizon - 1)
        self._places = torch.arange(rows, device=at.device), at
        self._horizon, self._masks = horizon, {}

    def end_decode(self) -> None:
        """Count the token that the forward pass has appended to every row."""
        assert self._places is not None
        self.lengths[: len(self._places[0])] += 1

    def move(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Move rows to other slots.

        Args:
            sources: slots to move from.
            targets: slots to move to, none of them a source.
            length: of the longest.
        """
        source, target = torch.tensor(sources).to(self.lengths.device), torch.tensor(targets).to(self.lengths.device)
        self.lengths[target] = self.lengths[source]
        for pair in self._layers.values():
            for memory in pair:
                memory[target, :, :length] = memory[source, :, :length]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(memory.nbytes for pair in self._layers.values() for memory in pair)
