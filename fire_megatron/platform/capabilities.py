"""What fused kernels this machine offers, and what runs in their place."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass

from fire_megatron.platform.apex import EXTENSION, find_apex, import_problem
from fire_megatron.platform.device import Device


@dataclass(frozen=True)
class Capability:
    """One optional dependency as found on this machine."""

    name: str
    version: str | None
    """Version when usable, else None."""
    detail: str
    """What is used: the kernel itself, or what replaces it and why."""


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _lacking(
    name: str, version: str | None, device: Device, modules: Iterable[str], fallback: str
) -> Capability | None:
    """A dependency that is not installed, has no GPU here, or none of whose modules imports; else None."""
    if version is None:
        why = "not installed"
    elif not device.is_cuda:
        why = f"{version} installed, needs a GPU"
    else:
        problems = [import_problem(module) for module in modules]
        if None in problems:
            return None
        why = f"{version} does not import ({', '.join(map(str, problems))})"
    return Capability(name, None, f"{why}; {fallback}")


def _transformer_engine(device: Device) -> Capability:
    name, version = "transformer-engine", _version("transformer-engine")
    fallback = "layer spec 'local': megatron-core layers, our RMSNorm and scaled_dot_product_attention"
    return _lacking(name, version, device, ["transformer_engine.pytorch"], fallback) or Capability(
        name, version, "layer spec 'te', where a role does not ask for 'local'"
    )


def _apex(device: Device) -> Capability:
    """NVIDIA's apex; one that is not is refused before a run begins."""
    engine = _transformer_engine(device).version is not None
    fallback = f"{'Transformer Engine' if engine else 'torch'} kernels instead"
    package = find_apex()
    if package is None:
        return Capability("apex", None, f"not installed; {fallback}")
    if package.is_folder:
        return Capability("apex", None, f"not installed (a mere folder, {package.place}, is ignored); {fallback}")
    if not package.is_nvidias:
        return Capability("apex", None, f"an unrelated package, {package}: uninstall it; {fallback}")
    version = package.version or "unknown"
    if not device.is_cuda:
        return Capability("apex", None, f"{version} installed, needs a GPU; {fallback}")
    problem = import_problem(EXTENSION)
    if problem:
        return Capability("apex", None, f"{version}: its CUDA extension does not import ({problem}); {fallback}")
    used = "installed, but Transformer Engine's optimizer comes first" if engine else "fused optimizer kernels"
    return Capability("apex", version, used)


def _flash_attention(device: Device) -> Capability:
    """Release 2 or 3, which have distributions and modules of their own."""
    fallback = "torch scaled_dot_product_attention"
    releases = {"flash-attn": "flash_attn", "flash-attn-3": "flash_attn_interface"}
    have = {name: version for name in releases if (version := _version(name)) is not None}
    installed = " and ".join(have.values()) or None
    lacking = _lacking("flash-attn", installed, device, [releases[name] for name in have], fallback)
    if lacking is not None:
        return lacking
    working = [version for name, version in have.items() if import_problem(releases[name]) is None]
    if _transformer_engine(device).version is None:
        used = f"installed, but only Transformer Engine's attention would call it; {fallback}"
    else:
        used = f"Transformer Engine's attention may choose it; sampling and float32 take {fallback}"
    return Capability("flash-attn", " and ".join(working), used)


def _triton(device: Device) -> Capability:
    """Brought by torch for CUDA; on a CPU nothing of it is used."""
    name, version, fallback = "triton", _version("triton"), "plain torch in place of the kernels of ours"
    lacking = _lacking(name, version, device, ["triton"], fallback)
    return lacking or Capability(name, version, "kernels of ours, unless FIRE_KERNELS is 0")


def _nvidia_ml_py(device: Device) -> Capability:
    """NVML's bindings, whose module has the name ``pynvml``."""
    name, version, fallback = "nvidia-ml-py", _version("nvidia-ml-py"), "no gpu/... metrics"
    lacking = _lacking(name, version, device, ["pynvml"], fallback)
    if lacking is not None:
        return lacking
    nvml = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
        nvml.nvmlShutdown()
    except Exception as error:  # no driver library in a container, for instance
        return Capability(name, None, f"{version}: the driver does not answer ({error}); {fallback}")
    return Capability(name, version, "gpu/... metrics, unless metrics.gpu_interval is 0")


def detect_capabilities(device: Device) -> tuple[Capability, ...]:
    """Look for Transformer Engine, NVIDIA's apex and flash-attention."""
    return tuple(probe(device) for probe in (_transformer_engine, _apex, _flash_attention))


def capability_report(device: Device) -> str:
    """Lines for the console: device, versions, what was found and what stands in."""
    lines = [
        f"device              {device.describe()}",
        f"torch               {_version('torch')}, megatron-core {_version('megatron-core')}",
    ]
    for found in (*detect_capabilities(device), _triton(device), _nvidia_ml_py(device)):  # which starts NVML, once
        lines.append(f"{found.name:<19} {found.version or '-'}: {found.detail}")
    return "\n".join(lines)
