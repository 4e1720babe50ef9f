"""Readings of all GPUs of a run, also those of ranks that hold none of the student, in the student's metrics."""

from __future__ import annotations

from typing import Self

from fire_megatron.config.schema import MetricsConfig
from fire_megatron.metrics.gpu_sampler import GpuSampler
from fire_megatron.metrics.values import Value, from_plain, merge, to_plain
from fire_megatron.parallel.control import Control
from fire_megatron.platform.device import Device, gpu_identity


class GpuReadings:
    """This rank's part. Samples between ``with`` and its end."""

    def __init__(self, device: Device, config: MetricsConfig, control: Control | None) -> None:
        """Args: device: this rank's; config: how often; control: between the student and ranks without it, if any."""
        self._sampler = GpuSampler(gpu_identity(device), interval=config.gpu_interval)
        self._control = control

    def __enter__(self) -> Self:
        self._sampler.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._sampler.__exit__(*exception)

    def report(self) -> None:
        """On a rank without the student: send what was seen since the last report."""
        values = self._sampler.values()
        if values and self._control is not None:
            self._control.report(to_plain(values))

    def values(self) -> dict[str, Value]:
        """On a rank of the student: what was seen since the last call, to be reduced over the student's ranks. One of
        them adds what has been reported to it."""
        values = self._sampler.values()
        for part in self._control.reports() if self._control is not None else []:
            merge(values, from_plain(part))
        return values
