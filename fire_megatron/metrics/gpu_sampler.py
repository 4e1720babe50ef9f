"""What a rank's GPU did during a step, by NVML: utilisation, memory, power, temperature, memory errors, throttling.

A thread samples, since a call of NVML may take milliseconds and may hang with the driver; nothing in the run waits for
it. Where there is no GPU there is no thread either, and where something cannot be read its metric is missing.
Source: NVIDIA's NVML API reference, through its Python bindings nvidia-ml-py.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

from fire_megatron.metrics.values import Max, Mean, Sum, Value, merge
from fire_megatron.platform.device import GpuIdentity

FAILURES = 3
"""Failures in a row after which something is not asked for again: most GPUs lack some of it."""
_PATIENCE = 5.0
"""Seconds that the end of a run waits for a call of NVML to come back."""
_SPARING = 20
"""A sample's own time is followed by at least so much of a pause, however slow the driver is."""

_CLOCK_SM, _SENSOR_GPU, _VOLATILE = 1, 0, 0
_ECC = {"gpu/ecc_corrected": 0, "gpu/ecc_uncorrected": 1}
_POWER = 0x4 | 0x80
"""Software power cap, and the power brake of the hardware."""
_THERMAL = 0x20 | 0x40
"""Software and hardware thermal slowdown."""
_SLOWDOWN = 0x8
"""Any slowdown by the hardware. Idle clocks and clocks set by a user are no throttling and have other bits."""


class GpuSampler:
    """Samples one GPU between ``with`` and its end, and gives what was seen since it was last asked."""

    def __init__(self, gpu: GpuIdentity | None, *, interval: float) -> None:
        """Args: gpu: this process's; None where it computes on the CPU. interval: seconds between samples; 0 takes
        none."""
        self._interval = interval
        self._seen: dict[str, Value] = {}
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = None
        if gpu is not None and interval > 0:
            self._thread = threading.Thread(target=self._run, args=(gpu,), name="GPU sampler", daemon=True)

    def __enter__(self) -> Self:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join(_PATIENCE)

    def values(self) -> dict[str, Value]:
        """The samples since the last call, to be reduced over ranks; empty when there was none. Does not wait."""
        with self._lock:
            seen, self._seen = self._seen, {}
        return seen

    def _run(self, gpu: GpuIdentity) -> None:
        try:
            nvml = importlib.import_module("pynvml")
            nvml.nvmlInit()
        except Exception:  # no library, no driver: the start-up report says so, once is enough
            return
        try:
            handle = find_gpu(nvml, gpu)
            if handle is not None:
                self._sample(_Gauges(nvml, handle))
        finally:
            with contextlib.suppress(Exception):
                nvml.nvmlShutdown()

    def _sample(self, gauges: _Gauges) -> None:
        while not self._end.is_set():
            started = time.monotonic()
            values = gauges.read()
            with self._lock:
                merge(self._seen, values)
            self._end.wait(max(self._interval, _SPARING * (time.monotonic() - started)))


def find_gpu(nvml: Any, gpu: GpuIdentity) -> Any:
    """NVML's handle of a GPU or MIG instance; None when it knows neither its names nor its place on the bus.

    NVML counts all GPUs of the node, CUDA only those that CUDA_VISIBLE_DEVICES leaves, in an order of its own: an index
    would be another GPU's.
    """
    lookups = [(nvml.nvmlDeviceGetHandleByUUID, name) for name in gpu.names]
    if gpu.bus_id is not None:
        lookups.append((nvml.nvmlDeviceGetHandleByPciBusId, gpu.bus_id))
    for lookup, name in lookups:
        with contextlib.suppress(Exception):
            return lookup(name)
    return None


class _Gauges:
    """Everything that is read of one GPU."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._before: dict[str, float] = {}
        gauges = [self._utilization, self._power, self._energy, self._temperature, self._clock, self._throttling]
        gauges += [self._ecc(key, kind) for key, kind in _ECC.items()]
        if not self._shared_out():
            gauges.append(self._memory)
        self._failures: dict[Callable[[], Mapping[str, Value]], int] = dict.fromkeys(gauges, 0)

    def read(self) -> dict[str, Value]:
        """One sample, without what this GPU does not tell."""
        values: dict[str, Value] = {}
        for gauge, failures in tuple(self._failures.items()):
            try:
                values |= gauge()
                self._failures[gauge] = 0
            except Exception:  # NVML's own, and whatever a binding that does not fit the driver raises
                self._failures[gauge] = failures + 1
                if failures + 1 == FAILURES:
                    del self._failures[gauge]
        return values

    def _shared_out(self) -> bool:
        """Whether this is a whole GPU in MIG mode, of which the process has but an instance that NVML did not find."""
        with contextlib.suppress(Exception):
            return self._nvml.nvmlDeviceGetMigMode(self._handle)[0] == 1
        return False  # also of an instance itself, which is not asked for its mode

    def _utilization(self) -> Mapping[str, Value]:
        rates = self._nvml.nvmlDeviceGetUtilizationRates(self._handle)
        return {"gpu/utilization": Mean(rates.gpu, 1), "gpu/memory_bandwidth_utilization": Mean(rates.memory, 1)}

    def _memory(self) -> Mapping[str, Value]:
        return {"gpu/memory_used_mb": Max(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used / 2**20)}

    def _power(self) -> Mapping[str, Value]:
        return {"gpu/power_w": Mean(self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000, 1)}  # milliwatts

    def _energy(self) -> Mapping[str, Value]:
        millijoules = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        return {"gpu/energy_j": Sum(self._since("gpu/energy_j", millijoules) / 1000)}

    def _temperature(self) -> Mapping[str, Value]:
        return {"gpu/temperature_c": Max(float(self._nvml.nvmlDeviceGetTemperature(self._handle, _SENSOR_GPU)))}

    def _clock(self) -> Mapping[str, Value]:
        return {"gpu/sm_clock_mhz": Mean(self._nvml.nvmlDeviceGetClockInfo(self._handle, _CLOCK_SM), 1)}

    def _throttling(self) -> Mapping[str, Value]:
        reasons = self._reasons()
        kinds = {"": _POWER | _THERMAL | _SLOWDOWN, "/power": _POWER, "/thermal": _THERMAL}
        return {f"gpu/throttled{kind}": Mean(float(bool(reasons & bits)), 1) for kind, bits in kinds.items()}

    def _reasons(self) -> int:
        try:
            return self._nvml.nvmlDeviceGetCurrentClocksEventReasons(self._handle)
        except Exception:  # the name that drivers before 535 know it by
            return self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle)

    def _ecc(self, key: str, kind: int) -> Callable[[], Mapping[str, Value]]:
        def gauge() -> Mapping[str, Value]:
            errors = self._nvml.nvmlDeviceGetTotalEccErrors(self._handle, kind, _VOLATILE)
            return {key: Sum(self._since(key, errors))}

        return gauge

    def _since(self, key: str, counter: float) -> float:
        """By how much a counter has grown since it was last read; what it held at the start is not the run's."""
        before, self._before[key] = self._before.get(key, counter), counter
        return float(max(counter - before, 0))
