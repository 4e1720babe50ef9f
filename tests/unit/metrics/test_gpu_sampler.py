"""Readings of a GPU that is not there: numbers, growth of counters, errors, and the life of the thread."""

from __future__ import annotations

import re
import sys
import threading
import time
from pathlib import Path

import pytest
from nvml import BUS_ID, UUID, FakeNvml, NVMLError
from processes import call

from fire_megatron.metrics import gpu_sampler as module
from fire_megatron.metrics.gpu_sampler import FAILURES, GpuSampler, _Gauges, find_gpu
from fire_megatron.metrics.values import Max, Mean, Sum, merge
from fire_megatron.platform.device import GpuIdentity

GPU = GpuIdentity((UUID,), BUS_ID)
KEYS = {
    "gpu/utilization",
    "gpu/memory_bandwidth_utilization",
    "gpu/memory_used_mb",
    "gpu/power_w",
    "gpu/energy_j",
    "gpu/temperature_c",
    "gpu/sm_clock_mhz",
    "gpu/throttled",
    "gpu/throttled/power",
    "gpu/throttled/thermal",
    "gpu/ecc_corrected",
    "gpu/ecc_uncorrected",
}


@pytest.fixture
def nvml(monkeypatch):
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "GPU sampler"]


def test_one_sample(nvml):
    assert _Gauges(nvml, "the handle").read() == {
        "gpu/utilization": Mean(80, 1),
        "gpu/memory_bandwidth_utilization": Mean(30, 1),
        "gpu/memory_used_mb": Max(3072.0),
        "gpu/power_w": Mean(350.0, 1),
        "gpu/energy_j": Sum(0.0),
        "gpu/temperature_c": Max(61.0),
        "gpu/sm_clock_mhz": Mean(1700, 1),
        "gpu/throttled": Mean(0.0, 1),
        "gpu/throttled/power": Mean(0.0, 1),
        "gpu/throttled/thermal": Mean(0.0, 1),
        "gpu/ecc_corrected": Sum(0.0),
        "gpu/ecc_uncorrected": Sum(0.0),
    }, "what the counters held at the start is not the run's"


def test_counters_give_their_growth(nvml):
    gauges = _Gauges(nvml, "the handle")
    total = merge({}, gauges.read())
    nvml.readings |= {"TotalEnergyConsumption": 9_700_000, "TotalEccErrors": {0: 8, 1: 2}}
    merge(total, gauges.read())
    nvml.readings |= {"TotalEnergyConsumption": 9_900_000, "TotalEccErrors": {0: 8, 1: 3}}
    merge(total, gauges.read())
    assert total["gpu/energy_j"] == Sum(900.0)
    assert (total["gpu/ecc_corrected"], total["gpu/ecc_uncorrected"]) == (Sum(3.0), Sum(1.0))
    nvml.readings["TotalEnergyConsumption"] = 100
    assert gauges.read()["gpu/energy_j"] == Sum(0.0), "a counter that began anew has not gone backwards"


@pytest.mark.parametrize(
    ("bits", "throttled", "power", "thermal"),
    [
        (0x1, 0, 0, 0),  # idle
        (0x2, 0, 0, 0),  # clocks set for applications
        (0x100, 0, 0, 0),  # clocks of a display
        (0x4, 1, 1, 0),  # software power cap
        (0x8, 1, 0, 0),  # hardware slowdown
        (0x20, 1, 0, 1),  # software thermal slowdown
        (0x8 | 0x40, 1, 0, 1),  # hardware thermal slowdown
        (0x8 | 0x80, 1, 1, 0),  # power brake
    ],
)
def test_what_counts_as_throttled(nvml, bits, throttled, power, thermal):
    nvml.readings["CurrentClocksEventReasons"] = bits
    values = _Gauges(nvml, "the handle").read()
    assert values["gpu/throttled"] == Mean(throttled, 1)
    assert (values["gpu/throttled/power"], values["gpu/throttled/thermal"]) == (Mean(power, 1), Mean(thermal, 1))


def test_drivers_that_know_throttling_by_its_old_name(nvml):
    nvml.errors["CurrentClocksEventReasons"] = NVMLError("Function Not Found")
    nvml.readings["CurrentClocksThrottleReasons"] = 0x4
    assert _Gauges(nvml, "the handle").read()["gpu/throttled"] == Mean(1, 1)


def test_what_cannot_be_read_is_left_out(nvml):
    nvml.errors |= {
        "PowerUsage": NVMLError("Not Supported"),
        "TotalEccErrors": NVMLError("Not Supported"),
        "Temperature": OSError("a binding that does not fit"),
    }
    del nvml.readings["ClockInfo"]  # a binding without the function
    gauges = _Gauges(nvml, "the handle")
    missing = {"gpu/power_w", "gpu/ecc_corrected", "gpu/ecc_uncorrected", "gpu/temperature_c", "gpu/sm_clock_mhz"}
    for _ in range(FAILURES + 2):
        assert set(gauges.read()) == KEYS - missing
    assert nvml.calls.count("PowerUsage") == nvml.calls.count("Temperature") == FAILURES, "nor asked for for ever"


def test_a_reading_that_fails_now_and_then_comes_back(nvml):
    gauges = _Gauges(nvml, "the handle")
    for _ in range(3):
        nvml.errors["PowerUsage"] = NVMLError("Timeout")
        for _ in range(FAILURES - 1):
            assert "gpu/power_w" not in gauges.read()
        del nvml.errors["PowerUsage"]
        assert gauges.read()["gpu/power_w"] == Mean(350.0, 1)


def test_memory_of_a_whole_gpu_in_mig_mode_is_not_the_instances(nvml):
    nvml.readings["MigMode"] = [1, 1]
    assert set(_Gauges(nvml, "the handle").read()) == KEYS - {"gpu/memory_used_mb"}
    nvml.errors["MigMode"] = NVMLError("Invalid Argument")  # an instance, or a GPU that knows no MIG
    assert set(_Gauges(nvml, "the handle").read()) == KEYS


@pytest.mark.parametrize(
    ("names", "bus_id", "found"),
    [
        ((UUID,), None, True),
        (("MIG-1", UUID), None, True),
        (("GPU-of-another",), BUS_ID, True),
        ((), BUS_ID, True),
        (("GPU-of-another",), "00000000:65:00.0", False),
        ((), None, False),
    ],
)
def test_the_gpu_is_looked_up_by_what_is_its_own(nvml, names, bus_id, found):
    assert find_gpu(nvml, GpuIdentity(names, bus_id)) == ("the handle" if found else None)


def wait_for_samples(nvml, count):
    for _ in range(count):
        assert nvml.sampled.acquire(timeout=10)
    time.sleep(0.05)  # the last one ends with its memory


def test_the_thread_samples_until_the_end(nvml):
    sampler = GpuSampler(GPU, interval=0.01)
    assert sampler.values() == {} and not threads(), "nothing before it is entered"
    with sampler:
        wait_for_samples(nvml, 3)
        (thread,) = threads()
        assert thread.daemon, "a hanging driver must not keep the process"
        values = sampler.values()
        assert set(values) == KEYS
        assert values["gpu/utilization"].count >= 3 and values["gpu/utilization"].result == 80
        assert nvml.running == 1
    assert not threads() and nvml.running == 0
    merge(values, sampler.values())
    assert sampler.values() == {}, "each sample is given once"
    assert values["gpu/utilization"].count == nvml.calls.count("UtilizationRates")


def test_a_step_has_its_own_samples(nvml):
    with GpuSampler(GPU, interval=0.01) as sampler:
        wait_for_samples(nvml, 2)
        sampler.values()
        nvml.readings |= {"Temperature": 50, "TotalEccErrors": {0: 6, 1: 2}}
        while nvml.sampled.acquire(blocking=False):
            pass
        wait_for_samples(nvml, 2)
        values = sampler.values()
    assert values["gpu/ecc_corrected"] == Sum(1.0)
    assert values["gpu/memory_used_mb"] == Max(3072.0)


def test_the_thread_ends_with_a_run_that_fails(nvml):
    with pytest.raises(ZeroDivisionError), GpuSampler(GPU, interval=60):
        wait_for_samples(nvml, 1)
        raise ZeroDivisionError
    assert not threads() and nvml.running == 0


def broken_init(nvml, monkeypatch):
    nvml.errors["Init"] = NVMLError("Driver Not Loaded")


def absent(nvml, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)


def unknown_gpu(nvml, monkeypatch):
    nvml.known = {"uuid": None, "bus_id": None}


def everything_fails(nvml, monkeypatch):
    nvml.errors = {name: NVMLError("GPU is lost") for name in nvml.readings}


@pytest.mark.parametrize("spoil", [broken_init, absent, unknown_gpu, everything_fails])
def test_without_driver_library_or_gpu_there_is_silence(nvml, monkeypatch, capfd, spoil):
    spoil(nvml, monkeypatch)
    monkeypatch.setattr(threading, "excepthook", lambda args: pytest.fail(f"a thread died of {args.exc_value}"))
    with GpuSampler(GPU, interval=0.001) as sampler:
        time.sleep(0.1)
        assert sampler.values() == {}
    assert not threads() and nvml.running == 0
    assert capfd.readouterr() == ("", "")


def test_a_call_that_hangs_holds_nothing_up(nvml, monkeypatch):
    monkeypatch.setattr("fire_megatron.metrics.gpu_sampler._PATIENCE", 0.2)
    hanging, go_on = threading.Event(), threading.Event()

    def hang(handle):
        hanging.set()
        go_on.wait(10)
        return 0

    nvml.nvmlDeviceGetPowerUsage = hang
    started = time.monotonic()
    with GpuSampler(GPU, interval=0.01) as sampler:
        assert hanging.wait(10)
        assert sampler.values() == {}
    assert time.monotonic() - started < 5
    go_on.set()
    while threads():
        time.sleep(0.01)


def test_a_slow_driver_is_asked_less_often(nvml):
    def slow(handle):
        time.sleep(0.02)
        return 0

    nvml.nvmlDeviceGetPowerUsage = slow
    with GpuSampler(GPU, interval=0.001):
        time.sleep(0.3)
    assert nvml.calls.count("UtilizationRates") <= 2


@pytest.mark.parametrize(("gpu", "interval"), [(None, 1.0), (GPU, 0.0)])
def test_no_thread_without_a_gpu_or_when_turned_off(nvml, gpu, interval):
    with GpuSampler(gpu, interval=interval) as sampler:
        assert not threads()
        assert sampler.values() == {}
    assert not nvml.calls


def test_nothing_is_imported_without_a_gpu():
    """In a process of its own: torch itself imports pynvml where it is installed, so it is hidden from torch."""
    code = """
import sys
sys.modules["pynvml"] = None
import torch
del sys.modules["pynvml"]
from fire_megatron.metrics.gpu_sampler import GpuSampler
from fire_megatron.platform.capabilities import capability_report
from fire_megatron.platform.device import Device, gpu_identity
with GpuSampler(gpu_identity(Device("cpu")), interval=0.01) as sampler:
    assert sampler.values() == {}
capability_report(Device("cpu"))
assert "pynvml" not in sys.modules
"""
    call("-c", code)


def test_the_real_bindings_have_what_is_asked_of_them():
    pynvml = pytest.importorskip("pynvml")
    source = Path(module.__file__).read_text(encoding="utf-8")
    names = set(re.findall(r"nvml\.(nvml\w+)", source))
    assert len(names) > 10 and not {name for name in names if not hasattr(pynvml, name)}
    assert (module._CLOCK_SM, module._SENSOR_GPU, module._VOLATILE) == (
        pynvml.NVML_CLOCK_SM,
        pynvml.NVML_TEMPERATURE_GPU,
        pynvml.NVML_VOLATILE_ECC,
    )
    assert list(module._ECC.values()) == [
        pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED,
        pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
    ]
    bit = {name: getattr(pynvml, f"nvmlClocksThrottleReason{name}") for name in REASONS}
    assert bit["SwPowerCap"] | bit["HwPowerBrakeSlowdown"] == module._POWER
    assert bit["SwThermalSlowdown"] | bit["HwThermalSlowdown"] == module._THERMAL
    assert bit["HwSlowdown"] == module._SLOWDOWN


REASONS = ("SwPowerCap", "HwPowerBrakeSlowdown", "SwThermalSlowdown", "HwThermalSlowdown", "HwSlowdown")
