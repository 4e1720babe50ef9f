"""What torch knows of this process's collectives: whether one has failed, and which the last ones were.

torch records the last collectives of each process (its flight recorder: ``FlightRecorder.hpp``). NCCL's and gloo's are
kept apart; what is written here is the record of the run's own backend, in the form that ``torchfrtrace`` reads.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

PREFIX_VARIABLES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
"""Where torch reads the names of its own dumps from, the present name first; older versions know the second only."""
_LOOK = "The last collectives of each rank: "


def failed_collective() -> str | None:
    """What NCCL says of this process's groups: None, or that one of them has failed. Does not wait.

    A collective on a GPU whose peer is gone does not return, so the main thread cannot tell. torch's watchdog sees the
    error within a second, notes it in the group (``get_error``), and ends the process a minute later.
    """
    for group, (backend, _) in list(dist.distributed_c10d._world.pg_map.items()):
        if dist.Backend.NCCL not in backend:
            continue
        with contextlib.suppress(RuntimeError):  # of a group that is being taken apart
            own = group._get_backend(torch.device("cuda"))
            while hasattr(own, "wrapped_pg"):  # TORCH_DISTRIBUTED_DEBUG=DETAIL
                own = own.wrapped_pg
            ask = getattr(own, "get_error", None)  # which not every version and backend has
            error = ask() if ask is not None else None
            if error is not None and error.name != "SUCCESS":
                return f"NCCL reports {error.name} in a group of {group.size()} ranks"
    return None


class FlightRecorder:
    """Writes this process's record to the file that torch would write it to."""

    def __init__(self, rank: int) -> None:
        """Args: rank: of the world; the file's name ends with it."""
        named = [os.environ[name] for name in PREFIX_VARIABLES if os.environ.get(name)]
        self.prefix = named[0] if named else None
        """Of the files of all ranks; None where no place has been set."""
        self._rank = rank

    def mentioned(self, text: str) -> str:
        """The text of an error, with where to look further."""
        return text if self.prefix is None else f"{text}. {_LOOK}{self.prefix}*"

    def dump(self, verdict: str) -> None:
        """Write the record, where the reason why the run ends mentions it. Does its best: the process is leaving."""
        if self.prefix is None or _LOOK not in verdict or not dist.is_initialized():
            return
        with contextlib.suppress(Exception):
            record: bytes = c10d._dump_nccl_trace() if dist.get_backend() == dist.Backend.NCCL else _gloo_record()
            path = Path(f"{self.prefix}{self._rank}")
            path.parent.mkdir(parents=True, exist_ok=True)
            # torch may be writing the same file; a rename leaves one of the two whole.
            partial = path.with_name(f"{path.name}.partial")
            partial.write_bytes(record)
            partial.replace(path)


def _gloo_record() -> bytes:
    """gloo's record, with the groups of this process, which gloo leaves out (torch 2.13) and ``torchfrtrace`` needs."""
    record = pickle.loads(c10d._dump_fr_trace())
    record["pg_config"] = {
        name: {"name": name, "desc": group.group_desc, "ranks": str(dist.get_process_group_ranks(group))}
        for group, name in list(dist.distributed_c10d._world.pg_names.items())
    }
    return pickle.dumps(record)
