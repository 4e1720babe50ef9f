"""A folder for one process at a time: on this machine, and seen from another one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from processes import ROOT, environment

from fire_megatron.config.errors import DataError
from fire_megatron.platform import folder_lock
from fire_megatron.platform.folder_lock import LOCK, alone_in

HOLDER = """
import sys, time
from pathlib import Path
from fire_megatron.config.errors import DataError
from fire_megatron.platform.folder_lock import alone_in
with alone_in(Path(sys.argv[1]), lambda holder: DataError(holder)):
    print("held", flush=True)
    time.sleep(60)
"""


def held(folder):
    """The lock, as this process takes it."""
    return alone_in(folder, lambda holder: DataError(f"in use by {holder}"))


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder."""
    words = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment())
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def from_elsewhere(tmp_path, monkeypatch):
    """``from_elsewhere(seconds)``: the file of a process of another machine, which counts as gone after this long."""

    def make(patience):
        monkeypatch.setattr(folder_lock, "_PATIENCE", patience)
        values = {"host": "node7", "space": "elsewhere", "pid": 17, "born": "1", "job": "5", "token": "x", "beat": 0}
        (tmp_path / LOCK).write_text(json.dumps(values))
        return tmp_path / LOCK, values

    return make


def test_one_at_a_time(tmp_path):
    folder = tmp_path / "new" / "folder"
    with held(folder), pytest.raises(DataError, match=rf"^in use by process {os.getpid()} on "), held(folder):
        pass
    with held(folder):
        pass
    assert list(folder.iterdir()) == []


def test_a_process_that_lives_holds_it_and_one_that_is_killed_does_not(tmp_path, other):
    for number in (None, signal.SIGSTOP):
        if number is not None:
            other.send_signal(number)
        with pytest.raises(DataError, match=f"process {other.pid} on "), held(tmp_path):
            pass
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    with held(tmp_path):  # a zombie as yet
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_is_about_to_be_gone(tmp_path, other):
    end = threading.Timer(0.7, other.kill)
    end.start()
    with held(tmp_path):
        end.join()


def test_a_process_id_that_has_been_given_again(tmp_path, other):
    path = tmp_path / LOCK
    other.send_signal(signal.SIGSTOP)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"born": "1"}))
    with held(tmp_path):
        pass


def test_a_process_of_another_machine_that_lives(tmp_path, from_elsewhere):
    path, values = from_elsewhere(30)
    beat = threading.Timer(1.0, lambda: path.write_text(json.dumps(values | {"beat": 1})))
    beat.start()
    with pytest.raises(DataError, match=r"in use by process 17 on node7 \(Slurm job 5\)"), held(tmp_path):
        pass
    beat.join()
    assert json.loads(path.read_text())["token"] == "x"


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}"])
def test_one_that_shows_no_life(tmp_path, from_elsewhere, text):
    path, _ = from_elsewhere(1.5)
    if text is not None:
        path.write_text(text)
    started = time.monotonic()
    with held(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert time.monotonic() - started > (0 if text == "" else 1.5)


def test_of_many_that_find_it_gone_one_takes_it(tmp_path, from_elsewhere):
    from_elsewhere(1.0)
    over = threading.Event()

    def attempt(_):
        try:
            with held(tmp_path):
                over.wait(10)
                return True
        except DataError:
            return False

    with ThreadPoolExecutor(8) as pool:
        attempts = [pool.submit(attempt, n) for n in range(8)]
        while sum(attempt.done() for attempt in attempts) < 7:
            time.sleep(0.05)
        over.set()
    assert sum(attempt.result() for attempt in attempts) == 1


def test_the_file_changes_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "_BEAT", 0.05)
    with held(tmp_path):
        seen = set()
        deadline = time.monotonic() + 10
        while len(seen) < 4 and time.monotonic() < deadline:
            seen.add(json.loads((tmp_path / LOCK).read_text())["beat"])
            time.sleep(0.02)
    assert len(seen) == 4


def test_a_process_whose_folder_was_taken_leaves(tmp_path, other):
    path = tmp_path / LOCK
    path.write_text(json.dumps({"host": "node7", "pid": 17, "token": "x"}).ljust(512))
    assert other.wait(10) == folder_lock.EXIT_CODE
    assert json.loads(path.read_text())["token"] == "x"
