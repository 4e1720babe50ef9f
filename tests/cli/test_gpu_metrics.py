"""Readings of a GPU in the metrics of a whole run, with a GPU that only NVML has; and of ranks without the student."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import pytest
from nvml import BUS_ID, UUID, FakeNvml, NVMLError
from processes import call
from tiny_run import read_metrics, tiny_recipe, train, write_recipe

from fire_megatron.config.schema import MetricsConfig
from fire_megatron.metrics.gpu_sampler import GpuSampler
from fire_megatron.metrics.values import Max, Mean, Sum
from fire_megatron.platform.device import Device, GpuIdentity
from fire_megatron.train import gpu_readings


@pytest.fixture
def nvml(monkeypatch):
    """NVML of a GPU that this process is told to have."""
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(gpu_readings, "gpu_identity", lambda device: GpuIdentity((UUID,), BUS_ID))
    return fake


def threads():
    """Those of samplers."""
    return [thread for thread in threading.enumerate() if thread.name == "GPU sampler"]


def gpu_keys(line):
    """Those of a step."""
    return {key for key in line if key.startswith("gpu/")}


def test_every_step_has_its_readings(tiny, tmp_path, nvml):
    nvml.errors["PowerUsage"] = NVMLError("Not Supported")
    assert train(tiny, tmp_path / "run", run__steps=2, metrics__gpu_interval=0.01) == 0
    for line in read_metrics(tmp_path / "run"):
        assert line["gpu/utilization"] == 80 and line["gpu/memory_used_mb"] == 3072 and line["gpu/ecc_corrected"] == 0
        assert "gpu/power_w" not in gpu_keys(line)
    assert not threads() and nvml.running == 0


def test_turned_off(tiny, tmp_path, nvml):
    assert train(tiny, tmp_path / "run", run__steps=2, metrics__gpu_interval=0) == 0
    assert not any(gpu_keys(line) for line in read_metrics(tmp_path / "run")) and not nvml.calls


def test_a_run_that_fails_leaves_no_thread(tiny, tmp_path, nvml, monkeypatch):
    seen = []

    def fail(*arguments, **named):
        seen.extend(threads())
        raise ZeroDivisionError

    monkeypatch.setattr("fire_megatron.train.loop.select", fail)
    with pytest.raises(ZeroDivisionError):
        train(tiny, tmp_path / "run", run__steps=2)
    assert seen and not threads() and nvml.running == 0


DRIVER = """
import os, sys
from nvml import BUS_ID, UUID, FakeNvml
from fire_megatron.cli.train import main
from fire_megatron.platform.device import GpuIdentity
from fire_megatron.train import gpu_readings

rank = int(os.environ["RANK"])
sys.modules["pynvml"] = fake = FakeNvml()
fake.readings |= {"Temperature": 50 + 20 * rank, "PowerUsage": 100_000 * (1 + rank)}
gpu_readings.gpu_identity = lambda device: GpuIdentity((UUID,), BUS_ID)
sys.exit(main(sys.argv[1:]))
"""


def test_gpus_of_teachers_on_ranks_of_their_own_count(tiny, tmp_path):
    values = tiny_recipe(tiny, tmp_path / "run", run__steps=3, metrics__gpu_interval=0.01)
    values["student"]["ranks"] = "0-0"
    for teacher in values["teachers"].values():
        teacher["ranks"] = "1-1"
    (tmp_path / "driver.py").write_text(DRIVER)
    call(tmp_path / "driver.py", "--recipe", write_recipe(tmp_path / "recipe.yaml", values), ranks=2)
    lines = read_metrics(tmp_path / "run")
    assert len(lines) == 3
    assert max(line["gpu/temperature_c"] for line in lines) == 70
    assert any(100 < line["gpu/power_w"] < 200 for line in lines), "a mean over both GPUs"


def test_ranks_without_the_student_report_theirs(monkeypatch):
    """One of the student's ranks adds what others have reported to its own."""
    told = []
    control = SimpleNamespace(report=told.append, reports=lambda: [told.pop(0) for _ in range(len(told))])
    own = iter([{"gpu/temperature_c": Max(70.0), "gpu/energy_j": Sum(5.0)}, {}, {"gpu/temperature_c": Max(60.0)}])
    monkeypatch.setattr(GpuSampler, "values", lambda self: next(own))
    ranks = [gpu_readings.GpuReadings(Device("cpu"), MetricsConfig(), control) for _ in range(2)]
    ranks[1].report()
    ranks[1].report()
    assert len(told) == 1, "nothing seen is nothing sent"
    assert ranks[0].values() == {"gpu/temperature_c": Max(70.0), "gpu/energy_j": Sum(5.0)}
    monkeypatch.setattr(GpuSampler, "values", lambda self: {"gpu/utilization": Mean(50, 1)})
    assert gpu_readings.GpuReadings(Device("cpu"), MetricsConfig(), None).values() == {"gpu/utilization": Mean(50, 1)}
