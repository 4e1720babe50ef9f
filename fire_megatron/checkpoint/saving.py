"""Saving a completed step, at once or while training continues.

A step is saved to a temporary folder beside its place and renamed when everything in it is on the disk, so that a
process killed at any moment leaves the earlier steps as they were.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from fire_megatron.checkpoint.amax import amax_tensors
from fire_megatron.checkpoint.folder import carry_files
from fire_megatron.checkpoint.optimizer_state import MASTER, initialise, steps_taken, whole_state
from fire_megatron.checkpoint.quantized import is_quantized
from fire_megatron.checkpoint.shards import Shard, by_parameter, model_shards
from fire_megatron.checkpoint.steps import OPTIMIZER, delete_old_steps, step_folder, tidy
from fire_megatron.checkpoint.torch_dist import ShardReader, ShardWriter, write_metadata
from fire_megatron.config.checkpoints import MARKER, WEIGHTS, read_marker
from fire_megatron.config.errors import CheckpointError
from fire_megatron.models.gpt import FireGPT
from fire_megatron.parallel.collectives import all_gather_objects, on_all_ranks
from fire_megatron.parallel.grid import ModelGrid
from fire_megatron.platform.device import host_copy
from fire_megatron.platform.files import fsync_tree, swap_in, write_json
from fire_megatron.platform.watch import tick


@dataclass(frozen=True)
class Chunk:
    """A rectangular part of a tensor of the checkpoint, which this rank writes."""

    key: str
    data: torch.Tensor
    offset: tuple[int, ...]
    global_shape: tuple[int, ...]


@dataclass(frozen=True)
class StepFile:
    """A completed step, but for its tensors."""

    checkpoints: Path
    """Folder of the run's checkpoints, seen by all ranks."""
    step: int
    """Steps completed."""
    common: dict[str, Any]
    """Values beside the tensors, the same on every rank; the first rank's are kept."""
    dtype: str
    """Of the weights."""
    source: Path
    """Checkpoint folder whose config and tokenizer go along."""
    keep: int
    """Newest steps to keep; older ones are deleted after this one is complete."""

    @property
    def target(self) -> Path:
        """The step's place."""
        return step_folder(self.checkpoints, self.step)

    @property
    def temporary(self) -> Path:
        """Where it is until it is complete."""
        return self.checkpoints / f".tmp_{self.target.name}"


def state_chunks(model: FireGPT, optimizer: MegatronOptimizer, *, grid: ModelGrid) -> Iterator[Chunk]:
    """What this rank is to write of weights and optimizer. Collective: all ranks of the grid go through all of it,
    since the ranks that hold the same parameter take turns as writers, one a parameter, and gather its state there.

    Quantised weights are written as what they were quantised from, so that any run or export can go on from them.
    """

    def chunk(key: str, shard: Shard, part: torch.Tensor) -> Iterator[Chunk]:
        real = shard.real(part)
        if real.numel():
            yield Chunk(key, real, shard.offset, shard.global_shape)

    for turn, (parameter, parts) in enumerate(by_parameter(model_shards(model, grid=grid))):
        group = parts[0].replicas
        owner = turn % group.size()
        writes = [shard for shard in parts if shard.writes] if group.rank() == owner else []
        quantized = is_quantized(parameter)
        for shard in () if quantized else writes:
            yield from chunk(shard.key, shard, shard.view)
        for name, whole in whole_state(optimizer, parameter, group=group, owner=owner):
            for shard in () if whole is None else writes:
                yield from chunk(f"{OPTIMIZER}{name}.{shard.key}", shard, shard.within(whole))
                if quantized and name == MASTER:
                    yield from chunk(shard.key, shard, shard.within(whole).to(parameter.dtype))
    if grid.pg.tp_dp_cp.rank() == 0:
        for name, tensor in amax_tensors(model):
            yield Chunk(name, tensor, (0,) * tensor.dim(), tuple(tensor.shape))


def _write_chunks(writer: ShardWriter, chunks: Iterable[Chunk], progress: Callable[[], None]) -> None:
    """Raises OSError where this rank cannot write, but only after its part in the other ranks' reduces."""
    failure = None
    for chunk in chunks:
        progress()
        if failure is None:
            try:
                writer.write(chunk.key, chunk.data, offset=chunk.offset, global_shape=chunk.global_shape)
            except OSError as error:
                failure = error
    if failure is not None:
        raise failure


def write_step(
    file: StepFile, chunks: Iterable[Chunk], *, group: dist.ProcessGroup, progress: Callable[[], None]
) -> None:
    """Write a step and put it in its place. Collective over the group. ``progress`` is called before each chunk.

    Raises:
        CheckpointError: on every rank, if any rank cannot write; earlier checkpoints are untouched.
    """
    first, weights = group.rank() == 0, file.temporary / WEIGHTS
    _attempt(lambda: _fresh_folder(file.temporary) if first else None, file.target, group)

    def write() -> list:
        with ShardWriter(weights, rank=group.rank()) as writer:
            _write_chunks(writer, chunks, progress)
            return writer.close()

    entries = [e for part in all_gather_objects(_attempt(write, file.target, group), group=group) for e in part]

    def complete() -> None:
        write_metadata(weights, entries, common=file.common)
        # Other ranks' files as this rank sees them: a folder that is not shared between nodes is found out here.
        ShardReader(weights).check_files()
        carry_files(file.source, file.temporary)
        marker = read_marker(file.source) or {}
        write_json(file.temporary / MARKER, marker | {"step": file.step, "dtype": file.dtype})
        fsync_tree(file.temporary)
        swap_in(file.temporary, file.target)
        delete_old_steps(file.checkpoints, keep=file.keep)

    _attempt(lambda: complete() if first else None, file.target, group)


def _fresh_folder(folder: Path) -> None:
    tidy(folder.parent)
    (folder / WEIGHTS).mkdir(parents=True)


def _attempt(action: Callable[[], Any], target: Path, group: dist.ProcessGroup) -> Any:
    """Run a rank's part of the writing; if the file system refuses any rank, all ranks raise."""

    def attempt() -> Any:
        try:
            return action()
        except (OSError, CheckpointError) as error:
            refused = CheckpointError(
                f"{target}: cannot be written ({error}); earlier checkpoints are untouched; checkpoint.dir must have "
                "room and be one folder for all ranks"
            )
            refused.passing = True
            raise refused from error

    return on_all_ranks(attempt, group=group)


class Saver:
    """Saves the steps of a run, in the background if it is given a group for that."""

    def __init__(
        self,
        checkpoints: Path,
        *,
        source: Path,
        keep: int,
        grid: ModelGrid,
        background: dist.ProcessGroup | None = None,
        holding: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """
        Args:
            checkpoints: folder of the run's checkpoints, seen by all ranks.
            source: checkpoint folder whose config and tokenizer go along.
            keep: newest steps to keep.
            grid: the student's.
            background: a group of all ranks of the grid that carries messages between hosts and that nobody else uses;
                None saves before :meth:`save` returns.
            holding: what to hold while a step is being written.
        """
        self._blank = StepFile(checkpoints, 0, {}, "", source, keep)
        self._grid, self._group, self._holding = grid, background, holding
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._done: deque[tuple[int, float]] = deque()
        self._pieces = 0

    def save(
        self,
        step: int,
        model: FireGPT,
        optimizer: MegatronOptimizer,
        *,
        rng: dict[str, Any],
        extra: dict[str, Any],
    ) -> None:
        """Save a completed step, after the one before it is complete. Collective over the grid.

        In the background, what this rank is to write is first copied to host memory, after which the training may
        change it: its share of weights and optimizer state, which the ranks that hold the same divide between them.

        Args:
            step: steps completed.
            model: this rank's stage.
            optimizer: the student's.
            rng: this rank's generator states; the first rank's are kept.
            extra: the trainer's values, the same on every rank: tensors, numbers, text, and lists and mappings of them.

        Raises:
            CheckpointError: on every rank, if any rank cannot write, or could not write the step before; steps that are
                complete are untouched.
        """
        self.wait()
        initialise(optimizer)  # before the first update there is nothing, which saves as zeros
        file = replace(
            self._blank,
            step=step,
            common={"step": step, "optimizer_steps": steps_taken(optimizer), "rng": rng, "extra": extra},
            dtype=str(model.config.params_dtype).split(".")[1],
        )
        chunks = state_chunks(model, optimizer, grid=self._grid)
        if self._group is None:
            self._write(file, chunks, self._grid.span, tick)
            return
        held = []
        for chunk in chunks:
            tick()
            held.append(replace(chunk, data=host_copy(chunk.data)))
        self._thread = threading.Thread(
            target=self._write_or_keep_failure,
            args=(file, held, self._group, self._advance),
            name=f"saving step {step}",
        )
        self._thread.start()

    def _write(
        self, file: StepFile, chunks: Iterable[Chunk], group: dist.ProcessGroup, progress: Callable[[], None]
    ) -> None:
        started = time.perf_counter()
        with self._holding():
            write_step(file, chunks, group=group, progress=progress)
        self._done.append((file.step, time.perf_counter() - started))

    def _advance(self) -> None:
        """On the thread that writes: its progress must not count as the training thread's."""
        self._pieces += 1

    def _write_or_keep_failure(self, *arguments: Any) -> None:
        try:
            self._write(*arguments)
        except BaseException as error:  # told by wait(), on the thread that trains
            self._failure = error

    def finished(self) -> list[tuple[int, float]]:
        """Steps completed since the last call, and the seconds that each took to write. Does not wait."""
        return [self._done.popleft() for _ in range(len(self._done))]

    @property
    def failed(self) -> bool:
        """Whether the step that was being saved could not be written, which :meth:`wait` tells on all ranks."""
        return self._failure is not None

    def wait(self) -> None:
        """Wait for the step that is being saved, if one is.

        Raises:
            CheckpointError: on every rank alike, if it could not be written.
        """
        seen = self._pieces
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(timeout=1.0)
            if seen != self._pieces:
                seen = self._pieces
                tick()
        self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
