"""What a watch asks, keeps and says; tests/cli/test_watching_ranks.py has processes that watch one another."""

from __future__ import annotations

import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from fire_megatron.platform import watch as watch_module
from fire_megatron.platform.flight_recorder import failed_collective
from fire_megatron.platform.watch import EXIT_CODE, Watch


class _Group:
    """A process group whose backend on CUDA says what NCCL says of it."""

    def __init__(self, error):
        """Args: error: name of torch's ErrorType."""
        self.error = SimpleNamespace(name=error)

    def size(self):
        return 4

    def _get_backend(self, device):
        assert device.type == "cuda"
        return SimpleNamespace(get_error=lambda: self.error)


def test_torch_is_asked_whether_a_collective_has_failed(monkeypatch):
    groups = {_Group("COMM_ERROR"): ("gloo", None), _Group("SUCCESS"): ("nccl", None)}
    monkeypatch.setattr(dist.distributed_c10d, "_pg_map", groups)
    assert failed_collective() is None
    groups[_Group("TIMEOUT")] = ("nccl", None)
    assert failed_collective() == "NCCL reports TIMEOUT in a group of 4 ranks"


def test_a_backend_that_cannot_be_asked_and_one_behind_torchs_wrapper(monkeypatch):
    """An older torch; TORCH_DISTRIBUTED_DEBUG=DETAIL."""
    silent, wrapped = _Group("SUCCESS"), _Group("COMM_ERROR")
    silent._get_backend = lambda device: SimpleNamespace()
    own = wrapped._get_backend(torch.device("cuda"))
    wrapped._get_backend = lambda device: SimpleNamespace(wrapped_pg=own)
    groups = {silent: ("nccl", None)}
    monkeypatch.setattr(dist.distributed_c10d, "_pg_map", groups)
    assert failed_collective() is None
    groups[wrapped] = ("nccl", None)
    assert failed_collective() == "NCCL reports COMM_ERROR in a group of 4 ranks"


def test_signs_of_life_outlast_a_fault_of_their_own(monkeypatch, capfd):
    """Of what asks NCCL, and of what judges the others; told once."""

    def fault(*_):
        raise AttributeError("made up")

    monkeypatch.setattr(watch_module, "failed_collective", fault)
    monkeypatch.setattr(Watch, "_judge", fault)
    watch = Watch(dist.HashStore(), rank=0, size=2, roles="", timeout=0.2).start()
    began = time.monotonic()
    while json.loads(watch._store.get("fire/beat/0"))["count"] < 5:
        assert time.monotonic() - began < 20, "the thread has died"
        time.sleep(0.02)
    watch.close(farewell=0.0)
    said = capfd.readouterr().err
    assert said.count("AttributeError: made up") == 1 and "rank 0: the signs of life go on" in said


def test_a_process_that_is_to_leave_leaves_also_where_nobody_reads_what_it_prints(monkeypatch):
    left = []
    monkeypatch.setattr(watch_module.os, "_exit", left.append)
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=lambda text: (_ for _ in ()).throw(BrokenPipeError())))
    with pytest.raises(BrokenPipeError):
        Watch(dist.HashStore(), rank=0, size=2, roles="", timeout=0.2)._leave("a verdict")
    assert left == [EXIT_CODE]


def test_a_failed_collective_where_nobody_is_missing(monkeypatch):
    """The network's fault, or a GPU's: whoever is missing is given time to show it first."""
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", "/run/rank_")
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watch = Watch(dist.HashStore(), rank=0, size=3, roles="role0", timeout=600.0)
    verdicts = []
    for now[0] in range(1, 40):
        for rank in range(3):
            beat = {"count": now[0], "roles": f"role{rank}", "doing": "update", "seconds": 1.0, "still": 1.0, "at": ""}
            failed = "NCCL reports COMM_ERROR" if rank == 1 and now[0] >= 2 else None
            beat |= {"patient": False, "saving": False, "failed": failed}
            watch._store.set(f"fire/beat/{rank}", json.dumps(beat))
        verdicts.append(watch._judge())
    first = next(i for i, verdict in enumerate(verdicts, 1) if verdict)
    assert first == 2 + 16 and first < 60, "torch ends the process a minute after the error"
    assert "a collective has failed, and all ranks are alive (NCCL reports COMM_ERROR)" in verdicts[-1]
    assert "rank 1 (role1): update for 1 s" in verdicts[-1] and "rank 0" not in verdicts[-1]
    assert verdicts[-1].endswith("The last collectives of each rank: /run/rank_*")


def test_the_first_verdict_stands():
    store = dist.HashStore()
    watches = [Watch(store, rank=rank, size=2, roles="", timeout=600.0) for rank in range(2)]
    assert [watch.fail(f"of {rank}") for rank, watch in enumerate(watches)] == ["of 0", "of 0"]


def test_who_waited_patiently_goes_on_with_what_it_was_at():
    watch = Watch(dist.HashStore(), rank=0, size=2, roles="", timeout=600.0)
    watch.doing("rollout")
    with watch.patiently("waiting"):
        assert (watch._doing, watch._patient) == ("waiting", True)
    assert (watch._doing, watch._patient) == ("rollout", False)
    with pytest.raises(ValueError), watch.patiently("waiting in vain"):
        raise ValueError
    assert (watch._doing, watch._patient) == ("rollout", False)
