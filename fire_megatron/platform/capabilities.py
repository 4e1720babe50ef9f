"""What fused kernels this machine offers, and what runs in their place."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
from dataclasses import dataclass

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


def _importable(module: str) -> str | None:
    """None when ``module`` imports, else the reason that it does not."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken binary extension raises whatever it likes
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _transformer_engine(device: Device) -> Capability:
    fallback = "layer spec 'local': megatron-core layers, our RMSNorm and scaled_dot_product_attention"
    version = _version("transformer-engine")
    if version is None:
        return Capability("transformer-engine", None, f"not installed; {fallback}")
    if not device.is_cuda:
        return Capability("transformer-engine", None, f"{version} installed, needs a GPU; {fallback}")
    problem = _importable("transformer_engine.pytorch")
    if problem:
        return Capability("transformer-engine", None, f"{version} does not import ({problem}); {fallback}")
    return Capability("transformer-engine", version, "layer spec 'te'")


def _apex(device: Device) -> Capability:
    """NVIDIA's apex, told by its own modules: the ``apex`` of the package index is another project."""
    fallback = "torch kernels instead"
    package = importlib.util.find_spec("apex")
    if package is None:
        return Capability("apex", None, f"not installed; {fallback}")
    # Looked for in its folder, without importing the package: the other apex raises when it is imported.
    folder, find = package.submodule_search_locations, importlib.machinery.PathFinder.find_spec
    if not all(find(f"apex.{name}", folder) for name in ("multi_tensor_apply", "optimizers")):
        return Capability("apex", None, f"an unrelated package named apex is installed (uninstall it); {fallback}")
    if not device.is_cuda:
        return Capability("apex", None, f"installed, needs a GPU; {fallback}")
    problem = _importable("amp_C")
    if problem:
        return Capability("apex", None, f"its CUDA extension does not import ({problem}); {fallback}")
    return Capability("apex", _version("apex") or "unknown", "fused optimizer and norm kernels")


def _flash_attention(device: Device) -> Capability:
    fallback = "torch scaled_dot_product_attention"
    version = _version("flash-attn")
    if version is None:
        return Capability("flash-attn", None, f"not installed; {fallback}")
    if not device.is_cuda:
        return Capability("flash-attn", None, f"{version} installed, needs a GPU; {fallback}")
    problem = _importable("flash_attn")
    if problem:
        return Capability("flash-attn", None, f"{version} does not import ({problem}); {fallback}")
    return Capability("flash-attn", version, f"installed, but the core attention calls {fallback}")


def detect_capabilities(device: Device) -> tuple[Capability, ...]:
    """Look for Transformer Engine, NVIDIA's apex and flash-attention."""
    return tuple(probe(device) for probe in (_transformer_engine, _apex, _flash_attention))


def capability_report(device: Device) -> str:
    """Lines for the console: device, versions, what was found and what stands in."""
    lines = [
        f"device              {device.describe()}",
        f"torch               {_version('torch')}, megatron-core {_version('megatron-core')}",
    ]
    for found in detect_capabilities(device):
        lines.append(f"{found.name:<19} {found.version or '-'}: {found.detail}")
    return "\n".join(lines)
