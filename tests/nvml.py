"""A GPU for tests, as NVML's Python bindings show it: readings that a test sets, and errors where it says so."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

UUID, BUS_ID = "GPU-5f1c2a9e-0000-0000-0000-000000000001", "00000000:17:00.0"


class NVMLError(Exception):
    """What the bindings raise."""


class FakeNvml:
    """Stands for the module ``pynvml`` on a node with one GPU, or in place of a MIG instance of it."""

    def __init__(self, *, uuid: str | None = UUID, bus_id: str | None = BUS_ID) -> None:
        """Args: what it knows the GPU by."""
        self.known = {"uuid": uuid, "bus_id": bus_id}
        self.readings: dict[str, Any] = {
            "UtilizationRates": SimpleNamespace(gpu=80, memory=30),
            "MemoryInfo": SimpleNamespace(used=3 * 2**30),
            "PowerUsage": 350_000,
            "TotalEnergyConsumption": 9_000_000,
            "Temperature": 61,
            "ClockInfo": 1700,
            "CurrentClocksEventReasons": 0,
            "CurrentClocksThrottleReasons": 0,
            "TotalEccErrors": {0: 5, 1: 2},
            "MigMode": [0, 0],
        }
        self.errors: dict[str, Exception] = {}
        """Raised in place of a reading."""
        self.calls: list[str] = []
        self.running = 0
        """Starts of NVML without an end."""
        self.sampled = threading.Semaphore(0)
        """Released after each sample, which ends with the memory unless that is not read."""

    def nvmlInit(self) -> None:
        if "Init" in self.errors:
            raise self.errors["Init"]
        self.running += 1

    def nvmlShutdown(self) -> None:
        self.running -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return self._found("uuid", uuid)

    def nvmlDeviceGetHandleByPciBusId(self, bus_id: str) -> str:
        return self._found("bus_id", bus_id)

    def _found(self, kind: str, name: str) -> str:
        if self.known[kind] != name:
            raise NVMLError("Not Found")
        return "the handle"

    def __getattr__(self, name: str) -> Any:
        reading = name.removeprefix("nvmlDeviceGet")
        if reading == name or reading not in self.readings:
            raise AttributeError(name)

        def read(handle: str, *arguments: int) -> Any:
            assert handle == "the handle"
            self.calls.append(reading)
            if reading == "MemoryInfo":
                self.sampled.release()
            if reading in self.errors:
                raise self.errors[reading]
            value = self.readings[reading]
            return value[arguments[0]] if reading == "TotalEccErrors" else value

        return read
