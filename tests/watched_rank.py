"""A rank of tests/cli/test_watching_ranks.py: watches others and is watched, and behaves as it is told. It imports only
what the process that it is a fork of has imported already."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta

import torch.distributed as dist

from fire_megatron.parallel.control import Control
from fire_megatron.platform import watch as module
from fire_megatron.platform.watch import Watch, tick

SAVING = 5.5
"""Seconds that a save takes."""


def run(files: str, rank: int, size: int, port: int, behaviour: str, timeout: float) -> None:
    """One process; what it prints goes to ``files`` with ``.out`` and ``.err``."""
    for number, name in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(files + name, os.O_WRONLY | os.O_CREAT), number)
    if behaviour == "failed":
        module.failed_collective = lambda: "NCCL reports COMM_ERROR"
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0, timeout=timedelta(seconds=60))
    watch = Watch(store, rank=rank, size=size, roles=f"role{rank}", timeout=timeout).start()
    watch.doing("working")
    signal.signal(signal.SIGTERM, lambda *_: None)
    store.set(f"ready{rank}", "")
    store.wait([f"ready{r}" for r in range(size)])
    time.sleep(1.0)
    print("ready", flush=True)
    if behaviour == "end":
        time.sleep(0.5 * rank)  # one after the other, rank 0 first
    elif behaviour == "fail":
        time.sleep(1.0)  # the others are at work
        watch.fail("made up")
        watch.close(farewell=5.0)
        os._exit(7)
    elif behaviour == "save":
        with watch.unbroken():
            time.sleep(SAVING)
            print("saved", flush=True)
        time.sleep(60)
    elif behaviour == "blocked":
        store.wait(["never"], timedelta(seconds=60))  # in C++, where no handler of Python's runs
    elif behaviour == "busy":
        for _ in range(600):
            tick()
            time.sleep(0.1)
    elif behaviour == "waiting":  # in the package, where the verdict can say the place
        watch.doing("waiting for others", patient=True)
        Control(store, speaks=False).wait(lambda: None)
    else:
        time.sleep(60)
    watch.close()
