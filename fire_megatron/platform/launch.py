"""Process start-up under torchrun, srun or a plain ``python``."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import enum
import itertools
import json
import math
import os
import resource
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from fire_megatron.config.errors import LayoutError, UserError
from fire_megatron.platform import cpu_seam
from fire_megatron.platform.apex import hide_unusable_apex
from fire_megatron.platform.device import Device, choose_attention_kernels, own_gpu, same_kind, select_device
from fire_megatron.platform.flight_recorder import PREFIX_VARIABLES
from fire_megatron.platform.launcher import launched_rank, launched_world_size, variable
from fire_megatron.platform.quiet import quiet_third_parties
from fire_megatron.platform.watch import Watch

_store: dist.Store | None = None
"""Where the ranks meet; made once, since each making counts as another arrival."""
_questions = itertools.count()
"""Numbers what the ranks have asked one another over the store alone."""
_OURS = "FIRE_MEGATRON_DEFAULTS"
"""Environment variable that lists others and the values that this program has given them. Another run in this process,
or in one that it starts, tells by it what the user has not set."""
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_TORCH_HEARTBEAT = 480
"""Seconds after which torch ends a process whose NCCL watchdog stands still, unless told otherwise."""


@dataclass(frozen=True)
class World:
    """This process's place in the run."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: Device

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes the run's files."""
        return self.rank == 0


class Restart(enum.Enum):
    """How this process came to be started."""

    NO = "by hand"
    LAUNCHER = "after processes of the same launch have failed: by torchrun, or a script that says so"
    SCHEDULER = "by Slurm, which had put the job back in the queue"


def restart() -> Restart:
    """What launcher and scheduler say of this start."""
    if variable("FIRE_MEGATRON_RESTART", "TORCHELASTIC_RESTART_COUNT", default=0):
        return Restart.LAUNCHER
    return Restart.SCHEDULER if variable("SLURM_RESTART_COUNT", default=0) else Restart.NO


def _meeting_point(timeout: float) -> dist.Store:
    """The key-value store that the launcher announces, or one in memory for a single plain process."""
    global _store
    rank, size = launched_rank(), launched_world_size()
    if _store is None and size == 1 and "MASTER_ADDR" not in os.environ:
        _store = dist.HashStore()
    elif _store is None:
        patience = datetime.timedelta(seconds=timeout)
        try:
            _store = next(iter(dist.rendezvous("env://", rank=rank, world_size=size, timeout=patience)))[0]
        except (ValueError, RuntimeError) as error:
            raise LayoutError(
                f"rank {rank} of {size} cannot meet the others ({error}); start all ranks with torchrun, or set "
                "MASTER_ADDR and MASTER_PORT to the first node under srun"
            ) from error
    return _store


def _meeting(timeout: float) -> dist.Store:
    """The meeting point, for one question that all ranks ask at the same place."""
    return dist.PrefixStore(f"fire/{next(_questions)}", _meeting_point(timeout))


def collective_patience(timeout: float) -> datetime.timedelta:
    """How long a collective itself waits where ``run.collective_timeout`` is so many seconds. Longer, since the watch,
    which knows where every rank is, must report first."""
    return datetime.timedelta(seconds=1.25 * timeout)


def raise_on_any_rank(problem: str | None, *, timeout: float = 600.0) -> None:
    """Raise on every rank when any rank has a problem, before there is a process group to ask over.

    Args:
        problem: this rank's message, or None.
        timeout: seconds to wait for the other ranks.

    Raises:
        LayoutError: a rank did not come.
        UserError: the first rank's problem, the same on every rank.
    """
    rank, size = launched_rank(), launched_world_size()
    if size == 1:
        if problem is not None:
            raise UserError(problem)
        return
    store, patience = _meeting(timeout), datetime.timedelta(seconds=timeout)
    if problem is not None and store.add("problems", 1) == 1:
        store.set("problem", problem)
    if store.add("arrived", 1) == size:
        store.set("all_arrived", "")
    try:
        store.wait(["all_arrived"], patience)
        if store.add("problems", 0) == 0:
            return
        store.wait(["problem"], patience)
    except RuntimeError as error:
        raise LayoutError(f"rank {rank}: not all of the {size} ranks came within {timeout:.0f} s ({error})") from error
    raised = UserError(store.get("problem").decode())
    raised.everywhere = True
    if store.add("told", 1) == size:
        store.set("all_told", "")
    # The store may live in rank 0, which therefore leaves last; the others ask nothing of it any more.
    with contextlib.suppress(RuntimeError):
        if rank == 0:
            store.wait(["all_told"], patience)
    raise raised


def _set_threads(threads: int, local_size: int) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // local_size))


def _keep_freed_memory() -> None:
    """Have glibc keep the large blocks that tensors free, as torch's allocator does on a GPU.

    By default each is given back to the kernel and its pages are faulted in anew, 4 KiB at a time, by the next tensor
    of that size. No effect with another C library or allocator.
    """
    trim_threshold, mmap_threshold = -1, -3  # names of mallopt(3)
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)


def _prefer(value: str | None, *names: str) -> None:
    """Set these environment variables, names of one thing in several versions of torch, unless the user has set any of
    them. None takes back what another run has set."""
    ours: dict[str, str] = json.loads(os.environ.get(_OURS, "{}"))
    if any(name in os.environ and os.environ[name] != ours.get(name) for name in names):
        return
    for name in names:
        os.environ.pop(name, None)
        ours.pop(name, None)
        if value is not None:
            os.environ[name] = ours[name] = value
    os.environ[_OURS] = json.dumps(ours)


def _prepare_torch(timeout: float) -> None:
    """Settings that torch reads from the environment, each when it first needs it; the user's own stay. Args: timeout:
    see :func:`start`."""
    # Segments that grow leave no gaps when sizes change from step to step, or models come and go. torch reads the first
    # of these names that is set, in an order that has changed between versions.
    settings = "".join(os.environ.get(name, "") for name in _ALLOCATOR)
    if "expandable_segments" not in settings and "cudaMallocAsync" not in settings:
        for name in [name for name in _ALLOCATOR if name in os.environ] or _ALLOCATOR[:1]:
            os.environ[name] = ",".join(filter(None, (os.environ.get(name), "expandable_segments:True")))
    # Collectives in CUDA graphs would otherwise register buffers, which fails with segments that grow.
    _prefer("0", "NCCL_GRAPH_REGISTER")
    # Otherwise a group of n ranks opens n - 1 connections in each of them, whether it is used or not.
    _prefer("1", "TORCH_GLOO_LAZY_INIT")
    # The watch, which knows where every rank is, must report first.
    patience = math.ceil(collective_patience(timeout).total_seconds())
    _prefer(str(patience) if patience > _TORCH_HEARTBEAT else None, "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC")


def _prepare_records(records: Path | None, *, make: bool, timeout: float) -> None:
    """Say where the records of this start go: a folder within ``records`` that the first rank names, so that those of
    an earlier failure, of more ranks perhaps, are not taken for its own. Args: make: whether to make the folder, as
    torch, which writes there too, does not."""
    if records is None:
        _prefer(None, *PREFIX_VARIABLES)
        return
    meeting = _meeting(timeout)
    if launched_rank() == 0:
        for unused in records.glob("*"):
            with contextlib.suppress(OSError):  # it is not empty
                unused.rmdir()
        meeting.set("records", time.strftime("%Y-%m-%d_%H-%M-%S"))
    folder = records / meeting.get("records").decode()
    _prefer(str(folder / "rank_"), *PREFIX_VARIABLES)
    if make:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)


def _own_device(setting: str, local_rank: int, timeout: float) -> Device:
    """This rank's device. Every rank asks, whatever it has found, so that none waits for one that has left.

    Raises:
        UserError: on every rank: one has none that can be used, or two of them none that go together.
    """
    rank, chosen, meeting = launched_rank(), None, _meeting(timeout)
    try:
        chosen = select_device(setting, local_rank=local_rank)
        problem = same_kind(chosen, rank, meeting) or own_gpu(chosen, rank, meeting)
    except (LayoutError, RuntimeError) as error:  # RuntimeError: of a GPU that cannot be used
        problem = f"rank {rank} on {socket.gethostname()}: {error}" if launched_world_size() > 1 else str(error)
    raise_on_any_rank(problem, timeout=timeout)
    assert chosen is not None
    return chosen


def _allow_open_files() -> None:
    """As many open files, connections among them, as the system lets this process have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def start(device: str = "auto", *, timeout: float = 600.0, threads: int = 0, records: Path | None = None) -> World:
    """Join the run: pick the device, install the CPU seam where needed, open the default process group.

    Works under torchrun, under ``srun`` with MASTER_ADDR set, and as a single plain process.

    Args:
        device: ``auto``, ``cpu`` or ``cuda`` (``run.device``).
        timeout: seconds after which a stalled collective ends the run (``run.collective_timeout``).
        threads: CPU threads a rank; 0 shares the node's cores among its ranks.
        records: folder for what is known of each rank's last collectives when the run fails: in it, a folder named
            by the time of this start, with ``rank_<n>``.

    Raises:
        LayoutError: the launcher's variables make no sense.
        UserError: on every rank: the device setting makes no sense on one of them, two are on one GPU, or some on GPUs
            and others not.
    """
    quiet_third_parties()
    _prepare_torch(timeout)
    _allow_open_files()
    rank, size = launched_rank(), launched_world_size()
    local_rank = variable("LOCAL_RANK", "SLURM_LOCALID", default=0)
    local_size = variable("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", default=1)
    chosen = _own_device(device, local_rank, timeout)
    choose_attention_kernels(chosen)
    hide_unusable_apex(on_gpu=chosen.is_cuda)
    _prepare_records(records, make=chosen.is_cuda, timeout=timeout)
    if not chosen.is_cuda:
        _set_threads(threads, local_size)
        _keep_freed_memory()
        cpu_seam.install()
    if not dist.is_initialized():
        store, patience = _meeting_point(timeout), collective_patience(timeout)
        dist.init_process_group(chosen.backend, store=store, rank=rank, world_size=size, timeout=patience)
    return World(rank, size, local_rank, local_size, chosen)


@contextlib.contextmanager
def simulate(kind: str) -> Iterator[None]:
    """Within the context, this process computes on tensors without memory, to plan a run, not to run it.

    Args:
        kind: ``cpu`` or ``cuda``, the device that the run is planned for.
    """
    quiet_third_parties()
    device, before = cpu_seam.standing_in()
    cpu_seam.install("meta", kind=kind)
    try:
        yield
    finally:
        cpu_seam.install(device, kind=before)


def watch(world: World, *, roles: str, timeout: float) -> Watch:
    """This process's signs of life, not begun. Args: see :class:`Watch`."""
    assert _store is not None, "start() comes first"
    return Watch(_store, rank=world.rank, size=world.size, roles=roles, timeout=timeout)


def store() -> dist.Store:
    """A connection of its own to where the ranks meet."""
    assert _store is not None, "start() comes first"
    return _store.clone()


def stop() -> None:
    """Leave the run; a no-op when it was never joined."""
    global _store, _questions
    if dist.is_initialized():
        dist.destroy_process_group()
    _store, _questions = None, itertools.count()
