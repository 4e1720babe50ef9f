"""Signs of life: every process of a run shows them, and all of them leave when one fails.

A rank that waits for another cannot tell a slow one from a dead one, and its own collective may be far from its timeout
or have none (teachers wait for work as long as the student samples). So each process counts up a number in the store
from a thread of its own; rank 0 looks at all of them, the others at rank 0 and at the verdict that anyone may post.

A process that lives may still hang: in a collective whose other side does something else, a kernel, a file system.
Whoever does work that may take long calls :func:`tick` between its pieces; a process without a tick for as long as a
collective may take has stalled, and the run ends with what each rank was doing.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from fire_megatron.platform.flight_recorder import FlightRecorder, failed_collective

EXIT_CODE = 3
"""Of a process that leaves because another one has failed."""
_BEAT, _VERDICT = "fire/beat", "fire/verdict"
FAREWELL_IN_FAILURE = 5.0
"""Seconds that rank 0 gives the others to hear why the run ends."""
_DONE = -1
_STALL = "no progress"
"""How the verdict on a run that hangs begins."""
_HURRIED = 8.0
"""Seconds without a sign of life that are enough once the launcher has begun to stop the processes, or a collective has
failed. torch itself ends a process a minute after its collective has."""
_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_active: Watch | None = None
"""Of this process, once it shows signs of life."""


def tick() -> None:
    """Say that this process makes progress. Cheap; a no-op in a process without a watch."""
    if _active is not None:
        _active.ticked()


class Watch:
    """This process's signs of life and its eye on the others."""

    def __init__(self, store: dist.Store, *, rank: int, size: int, roles: str, timeout: float) -> None:
        """Args: store: where the ranks meet; roles: of this rank, for messages; timeout: seconds within which a run
        ends after one of its processes died."""
        self._store, self._rank, self._size = store.clone(), rank, size
        self._roles, self._timeout = roles, timeout
        self._interval = min(1.0, timeout / 20)
        self._main = threading.main_thread().ident
        self.recorder = FlightRecorder(rank)
        self._failed: str | None = None
        self._failed_since: float | None = None
        self._troubled = False
        self.on_leave: Callable[[str], object] = lambda reason: None
        """Is told why this process leaves on account of another, before it does."""
        self._saving = False
        self.doing("starting")
        self._count = 0
        self._told = False
        self._seen: dict[int, tuple[int, float]] = {}
        self._hurried = False
        self._wakeup, self._signals = socket.socketpair()
        self._end = threading.Event()
        self._busy = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="signs of life", daemon=True)

    def start(self) -> Watch:
        """Begin to show signs of life, and to look for those of the others once all of them have begun."""
        global _active
        _active = self
        if self._size > 1:
            # A handler written in Python runs when the main thread comes back from C++, which it may not: it may be in
            # a collective with the very rank that has died.
            for end in (self._wakeup, self._signals):
                end.setblocking(False)
            if threading.current_thread() is threading.main_thread():
                signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
            self._beat()
            self._thread.start()
        return self

    def close(self, *, farewell: float = 30.0) -> None:
        """Leave: a process that is done is not missed.

        Rank 0 leaves last. Where no launcher holds the store, it goes with rank 0, and the others would take that for a
        death.

        Args:
            farewell: seconds that rank 0 gives the others to leave.
        """
        global _active
        _active = None
        self._end.set()
        if not self._thread.is_alive():
            return
        self._thread.join()
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
        self._take_leave(farewell)

    def _take_leave(self, farewell: float) -> None:
        with contextlib.suppress(RuntimeError):  # the store may have gone with the process that held it
            self._write("done", _DONE)
            deadline = time.monotonic() + farewell
            while self._rank == 0 and time.monotonic() < deadline:
                if all(beat["count"] == _DONE for beat in self._beats(range(self._size)).values()):
                    return
                time.sleep(0.05)

    def doing(self, what: str, *, patient: bool = False) -> None:
        """Say what this process is doing, for the message of a rank that has waited for it too long.

        Args:
            what: a few words.
            patient: it waits for other roles, which may take as long as they make progress.
        """
        self._doing, self._patient = what, patient
        self._since = self._last_tick = time.monotonic()

    @contextlib.contextmanager
    def patiently(self, what: str) -> Iterator[None]:
        """Within the context, this process waits for others, which may take as long as they make progress; then it
        resumes what it was doing."""
        before, patient = self._doing, self._patient
        self.doing(what, patient=True)
        try:
            yield
        finally:
            self.doing(before, patient=patient)

    def ticked(self) -> None:
        """See :func:`tick`."""
        self._last_tick = time.monotonic()

    @contextlib.contextmanager
    def unbroken(self) -> Iterator[None]:
        """Let this process finish saving something before it leaves on account of another. On any thread."""
        with self._busy:
            self._saving = True
            try:
                yield
            finally:
                self._saving = False

    def fail(self, text: str) -> str:
        """Tell all others why the run ends; the first to do so is heard. Returns what they hear."""
        with contextlib.suppress(RuntimeError):
            return self._store.compare_set(_VERDICT, "", text).decode()
        return text

    def give_up(self, text: str) -> str:
        """:meth:`fail` in a process that is about to leave by itself and stops looking at the others."""
        self._end.set()
        return self.fail(text)

    def describe(self, ranks: Sequence[int]) -> str:
        """What some ranks said last that they were doing, alike ones together: ``ranks 3, 5 (teachers.math): scoring
        for 61 s, in parallel/mail.py:74 _wait``."""
        alike: dict[str, list[int]] = defaultdict(list)
        for rank in ranks:
            try:
                beat = json.loads(self._store.get(f"{_BEAT}/{rank}"))
                at = f", in {beat['at']}" if beat["at"] else ""
                alike[f" ({beat['roles']}): {beat['doing']} for {beat['seconds']:.0f} s{at}"].append(rank)
            except (RuntimeError, ValueError):
                alike[": nothing is known of it"].append(rank)
        return "; ".join(
            f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}{what}" for what, ranks in alike.items()
        )

    def missing(self) -> list[int]:
        """Ranks that have shown no sign of life over the last seconds. Takes a few of them."""
        with contextlib.suppress(RuntimeError):
            before = self._beats(range(self._size))
            time.sleep(max(4 * self._interval, 2.0))
            after = self._beats(range(self._size))
            silent = [rank for rank in before if rank != self._rank and before[rank]["count"] == after[rank]["count"]]
            return [rank for rank in silent if after[rank]["count"] != _DONE]
        return [0] if self._rank else []

    # ---- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._end.wait(self._interval):
            verdict = None
            with self._surviving():
                self._failed = self._failed or failed_collective()
            with self._surviving():
                try:
                    self._beat()
                    self._hear_signals()
                    verdict = self._store.get(_VERDICT).decode() if self._store.check([_VERDICT]) else self._judge()
                except RuntimeError:
                    verdict, self._told = "the store where the ranks meet does not answer: its process has died", True
            if verdict and not self._end.is_set():
                self._leave(verdict)

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        """A fault here, reported once, must not end the thread: a process without signs of life counts as dead, and one
        that does not look at the others waits forever."""
        try:
            yield
        except Exception:
            if not self._troubled:
                traceback.print_exc()
                print(f"note: rank {self._rank}: the signs of life go on without this", file=sys.stderr, flush=True)
            self._troubled = True

    def _hear_signals(self) -> None:
        """A launcher that stops the processes may do so because one died: find out which before it kills all."""
        with contextlib.suppress(BlockingIOError):
            if {signal.SIGTERM, signal.SIGINT} & set(self._signals.recv(64)):
                self._hurried = True

    def _beat(self) -> None:
        self._count += 1
        self._write(self._doing, self._count)

    def _write(self, doing: str, count: int) -> None:
        now = time.monotonic()
        beat = {
            "count": count,
            "roles": self._roles,
            "doing": doing,
            "seconds": now - self._since,
            "still": now - self._last_tick,
            "patient": self._patient,
            "saving": self._saving,
            "failed": self._failed,
            "at": _place(sys._current_frames().get(self._main)),
        }
        self._store.set(f"{_BEAT}/{self._rank}", json.dumps(beat))

    def _beats(self, ranks: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Last sign of each of these ranks; nothing before all of them have begun: reading would wait for them."""
        keys = [f"{_BEAT}/{rank}" for rank in ranks]
        if not self._store.check(keys):
            return {}
        return dict(zip(ranks, map(json.loads, self._store.multi_get(keys)), strict=True))

    def _judge(self) -> str | None:
        """A verdict, when one of the ranks that this one watches has been silent, or has not got on, for too long."""
        beats = self._beats(range(self._size) if self._rank == 0 else range(1))
        verdict = self._judge_silence(beats)
        if verdict is None and self._rank == 0:
            verdict = self._judge_failed(beats) or self._judge_stall(beats)
        if verdict is None:
            return None
        heard = self.fail(verdict)
        self._told = heard == verdict
        return heard

    def _judge_silence(self, beats: dict[int, dict[str, Any]]) -> str | None:
        now = time.monotonic()
        failed = self._failed or any(beat["failed"] for beat in beats.values())
        for rank, beat in beats.items():
            count = beat["count"]
            # What is being saved is worth waiting for, also when a launcher that preempts the run has signalled.
            hurried = (self._hurried or failed) and not beat["saving"]
            patience = self._haste if hurried else self._timeout / 2
            last, when = self._seen.get(rank, (None, now))
            self._seen[rank] = (count, when if count == last else now)
            silent = now - self._seen[rank][1]
            if rank != self._rank and count != _DONE and silent > patience:
                return self.recorder.mentioned(
                    f"no sign of life for {silent:.0f} s; the last was of {self.describe([rank])}. It has died or "
                    "hangs, so the run ends; run again to continue from the last checkpoint"
                )
        return None

    @property
    def _haste(self) -> float:
        return min(_HURRIED, self._timeout / 2)

    def _judge_failed(self, beats: dict[int, dict[str, Any]]) -> str | None:
        """A collective has failed on ranks that are all alive; a silent rank is named by :meth:`_judge_silence`."""
        failed = [rank for rank, beat in beats.items() if beat["failed"]]
        now = time.monotonic()
        self._failed_since = (self._failed_since or now) if failed else None
        if self._failed_since is None or now - self._failed_since < 2 * self._haste:
            return None
        return self.recorder.mentioned(
            f"a collective has failed, and all ranks are alive ({beats[failed[0]]['failed']}), so the run ends: "
            f"{self.describe(failed)}. Look at the network and the GPUs (NCCL_DEBUG=WARN, dmesg); run again to "
            "continue from the last checkpoint"
        )

    def _judge_stall(self, beats: dict[int, dict[str, Any]]) -> str | None:
        at_work = {rank: beat for rank, beat in beats.items() if beat["count"] != _DONE}
        # Ranks that wait for others are stalled only when no rank works any more.
        working = {rank: beat for rank, beat in at_work.items() if not beat["patient"]}
        stalled = [rank for rank, beat in (working or at_work).items() if beat["still"] > self._timeout]
        if not stalled or (not working and len(stalled) < len(at_work)):
            return None
        others = [rank for rank in at_work if rank not in stalled]
        return self.recorder.mentioned(
            f"{_STALL} for {max(beats[rank]['still'] for rank in stalled):.0f} s, more than run.collective_timeout "
            f"({self._timeout:g} s), so the run ends. Stalled: {self.describe(stalled)}"
            + (f". Others: {self.describe(others)}" if others else "")
            + ". Run again to continue from the last checkpoint; if this was no hang, raise run.collective_timeout"
        )

    def _leave(self, verdict: str) -> None:
        try:
            with contextlib.suppress(Exception):
                self.on_leave(verdict)
            stack = sys._current_frames().get(self._main)
            if verdict.startswith(_STALL) and stack is not None:
                here = "".join(traceback.format_stack(stack))
                print(f"rank {self._rank} is here:\n{here}", file=sys.stderr, flush=True)
            self.recorder.dump(verdict)
            self._busy.acquire(timeout=self._timeout / 2)
            if self._rank == 0 or self._told:  # one that knows is enough, and rank 0's is the log that people read
                print(f"error: {verdict}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            self._take_leave(FAREWELL_IN_FAILURE)
        finally:  # whatever of this fails: nobody reads the output any more, for instance
            os._exit(EXIT_CODE)


def _place(frame: FrameType | None) -> str:
    """Where in this package a thread is: ``parallel/mail.py:74 _wait``; empty outside of it."""
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    if frame is None:
        return ""
    path = Path(frame.f_code.co_filename).relative_to(_PACKAGE)
    return f"{path}:{frame.f_lineno} {frame.f_code.co_name}"
