"""Processes that watch one another, with the store in rank 0 as under srun: who is blamed, who leaves, and how."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from processes import command, environment, free_ports

from fire_megatron.platform import watch as watch_module
from fire_megatron.platform.flight_recorder import failed_collective
from fire_megatron.platform.watch import EXIT_CODE, Watch

TIMEOUT = 8.0
"""Of the watches, seconds."""
PROCESS = """
import os, signal, sys, time
import torch.distributed as dist
from datetime import timedelta
from fire_megatron.parallel.control import Control
from fire_megatron.platform import watch as module
from fire_megatron.platform.watch import Watch, tick

if sys.argv[4] == "failed":
    module.failed_collective = lambda: "NCCL reports COMM_ERROR"
rank, size, port, behaviour = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0, timeout=timedelta(seconds=60))
watch = Watch(store, rank=rank, size=size, roles=f"role{rank}", timeout=float(sys.argv[5])).start()
watch.doing("working")
signal.signal(signal.SIGTERM, lambda *_: None)
store.set(f"ready{rank}", "")
store.wait([f"ready{r}" for r in range(size)])
time.sleep(1.0)
print("ready", flush=True)
if behaviour == "end":
    time.sleep(0.5 * rank)  # one after the other, rank 0 first
elif behaviour == "fail":
    watch.fail("made up")
    watch.close(farewell=5.0)
    os._exit(7)
elif behaviour == "save":
    with watch.unbroken():
        time.sleep(TIME_TO_SAVE)
        print("saved", flush=True)
    time.sleep(60)
elif behaviour == "blocked":
    store.wait(["never"], timedelta(seconds=60))  # in C++, where no handler of Python's runs
elif behaviour == "busy":
    for _ in range(600):
        tick()
        time.sleep(0.1)
elif behaviour == "waiting":  # in this package, where the verdict can say the place
    watch.doing("waiting for others", patient=True)
    Control(store, speaks=False).wait(lambda: None)
else:
    time.sleep(60)
watch.close()
""".replace("TIME_TO_SAVE", "5.5")


class Processes:
    """Some ranks, each with a behaviour of its own."""

    def __init__(self, *behaviours, timeout=TIMEOUT):
        """Starts them and waits until all of them work."""
        (port,) = free_ports(1)
        self.started = [
            subprocess.Popen(
                command("-c", PROCESS, rank, len(behaviours), port, behaviour, timeout),
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
            )
            for rank, behaviour in enumerate(behaviours)
        ]  # fmt: skip
        for process in self.started:
            assert process.stdout.readline() == "ready\n", process.stderr.read()

    def ends(self, patience=30):
        """(exit code, error lines) of each, and how long it took them."""
        began, ends = time.monotonic(), []
        for process in self.started:
            out, err = process.communicate(timeout=patience)
            ends.append((process.returncode, [line for line in err.splitlines() if line.startswith("error")], out))
        return ends, time.monotonic() - began


@pytest.fixture
def start():
    """Starts processes and leaves none behind."""
    made = []

    def processes(*behaviours, **options):
        made.append(Processes(*behaviours, **options))
        return made[-1]

    yield processes
    for process in (process for group in made for process in group.started):
        process.kill()
        process.communicate()


def test_a_good_end_is_one_on_every_rank(start):
    ends, _ = start("end", "end", "end").ends()
    assert [(code, errors) for code, errors, _ in ends] == [(0, [])] * 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_silent_rank_is_named_once_and_all_leave(start, number):
    processes = start("work", "work", "work")
    os.kill(processes.started[2].pid, number)
    began = time.monotonic()
    ends = [process.communicate(timeout=30) for process in processes.started[:2]]
    assert TIMEOUT / 2 - 1 < time.monotonic() - began < TIMEOUT + 4
    assert [process.returncode for process in processes.started[:2]] == [EXIT_CODE] * 2
    lines = [line for _, err in ends for line in err.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "rank 2 (role2): working" in lines[0], lines


def test_who_fails_is_heard_once_beside_itself(start):
    ends, _ = start("work", "fail", "work").ends()
    assert [code for code, _, _ in ends] == [EXIT_CODE, 7, EXIT_CODE]
    assert [errors for _, errors, _ in ends] == [["error: made up"], [], []]


def test_rank_0_fails_and_the_others_do_not_take_it_for_a_death(start):
    ends, _ = start("fail", "work", "work").ends()
    assert [code for code, _, _ in ends] == [7, EXIT_CODE, EXIT_CODE]
    assert [errors for _, errors, _ in ends] == [[], [], []]


def test_the_store_goes_with_rank_0(start):
    processes = start("work", "work")
    os.kill(processes.started[0].pid, signal.SIGKILL)
    (_, (code, errors, _)), seconds = processes.ends()
    assert code == EXIT_CODE and "the store where the ranks meet does not answer" in errors[0]
    assert seconds < TIMEOUT


def test_what_is_being_saved_is_finished(start):
    ends, _ = start("save", "fail").ends()
    assert [code for code, _, _ in ends] == [EXIT_CODE, 7]
    assert "saved" not in ends[0][2], "longer than half the timeout is not waited for"
    ends, _ = start("save", "fail", timeout=30.0).ends()
    assert [code for code, _, _ in ends] == [EXIT_CODE, 7] and "saved" in ends[0][2]


def test_silence_tells_sooner_after_a_signal_or_a_failed_collective_also_where_the_main_thread_is_in_cpp(start):
    """One run whose launcher signals, and one where a rank's collective fails, as NCCL's do when a peer dies: long
    before torch ends that rank."""
    signalled = start("blocked", "work", timeout=120.0)
    failing = start("blocked", "work", "failed", timeout=120.0)
    for processes in (signalled, failing):
        os.kill(processes.started[1].pid, signal.SIGKILL)
    time.sleep(0.5)
    began = time.monotonic()
    # As a launcher does, to a process that catches it.
    os.kill(signalled.started[0].pid, signal.SIGTERM)
    for process in (signalled.started[0], failing.started[0]):
        _, err = process.communicate(timeout=40)
        assert time.monotonic() - began < 20 < 120 / 2
        assert "rank 1 (role1): working" in err
    assert failing.started[2].wait(10) == EXIT_CODE


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


def test_a_rank_that_lives_but_does_not_get_on_ends_the_run(start):
    """Others that get on, or wait for those that do, are not blamed."""
    ends, seconds = start("waiting", "work", "busy", timeout=4.0).ends()
    assert [code for code, _, _ in ends] == [EXIT_CODE] * 3 and seconds < 10
    [[line], *others] = [errors for _, errors, _ in ends]
    assert others == [[], []], "told once"
    assert "no progress for" in line and "run.collective_timeout (4 s)" in line
    stalled, rest = line.split("Stalled: ")[1].split("Others: ")
    assert "rank 1 (role1): working for" in stalled and "rank 0" not in stalled
    assert "rank 0 (role0): waiting for others" in rest and "in parallel/control.py:" in rest
    assert "rank 2 (role2): working" in rest


def test_all_wait_for_one_another(start):
    ends, _ = start("waiting", "waiting", timeout=3.0).ends()
    [[line], _] = [errors for _, errors, _ in ends]
    assert "rank 0 (role0)" in line and "rank 1 (role1)" in line and "Others" not in line


def test_who_waits_for_one_that_gets_on_may_wait(start):
    processes = start("waiting", "busy", timeout=2.0)
    time.sleep(6)
    assert [process.poll() for process in processes.started] == [None, None]
