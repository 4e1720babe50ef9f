"""Orders from the student to ranks that hold none of it, by the store where the ranks meet.

A rank that waits for an order holds no collective open, so that it may wait as long as the student works.
"""

from __future__ import annotations

import datetime
import itertools
import json
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

_numbers = itertools.count()


class Control:
    """A numbered list of orders that one rank writes and others read."""

    def __init__(self, store: dist.Store, *, speaks: bool) -> None:
        """Args: store: a connection of its own; speaks: whether this is the rank that gives the orders. Every rank of
        the world makes its own Control alike."""
        self._store, self._speaks = store, speaks
        self._prefix = f"fire/control/{next(_numbers)}"
        self._next = 0
        self._unread = 1

    def announce(self, **order: Any) -> None:
        """Write the next order: names and plain values. A no-op on ranks that do not give orders."""
        if not self._speaks:
            return
        # Orders stay: a teacher without rows may be far behind, and each is a few dozen bytes.
        self._store.set(f"{self._prefix}/{self._next}", json.dumps(order))
        self._next += 1

    def wait(self, idle: Callable[[], None]) -> dict[str, Any]:
        """Wait for the next order. ``idle`` is called about once a second meanwhile."""
        key = f"{self._prefix}/{self._next}"
        while not self._arrived(key):
            idle()
        self._next += 1
        return json.loads(self._store.get(key))

    def _arrived(self, key: str) -> bool:
        try:
            self._store.wait([key], datetime.timedelta(seconds=1))
        except dist.DistStoreError:
            return False
        return True

    def ask_to_stop(self, signal_name: str) -> None:
        """Pass a signal on to the rank that gives the orders."""
        self._store.set(f"{self._prefix}/stop", signal_name)

    def asked_to_stop(self) -> str | None:
        """The signal that another rank has passed on. Does not wait; None on ranks that do not give orders."""
        key = f"{self._prefix}/stop"
        return self._store.get(key).decode() if self._speaks and self._store.check([key]) else None

    def report(self, values: dict[str, Any]) -> None:
        """Tell the rank that gives the orders something: plain values, which it reads when it gets to it."""
        number = self._store.add(f"{self._prefix}/reports", 1)
        self._store.set(f"{self._prefix}/report/{number}", json.dumps(values))

    def reports(self) -> list[dict[str, Any]]:
        """What other ranks have reported since the last call. Does not wait; empty on ranks that do not give orders."""
        read = []
        while self._speaks and self._store.check([key := f"{self._prefix}/report/{self._unread}"]):
            read.append(json.loads(self._store.get(key)))
            self._store.delete_key(key)
            self._unread += 1
        return read
