"""The report of fused kernels, against packages that are put on the path for it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys

import pytest

from fire_megatron.platform import Device, capability_report, detect_capabilities

CPU, CUDA = Device("cpu"), Device("cuda")
NAMES = ("transformer-engine", "apex", "flash-attn")
MODULES = ("transformer_engine", "apex", "amp_C", "flash_attn")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty folder of packages, searched first; any real ones of these names are hidden."""

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] in MODULES]:
            del sys.modules[name]

    real = importlib.metadata.version
    found = importlib.util.find_spec

    def version(name):
        if name in NAMES and not list(tmp_path.glob(f"{name.replace('-', '_')}-*")):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    def find_spec(name, package=None):
        there = name.split(".")[0] not in MODULES or (tmp_path / name.split(".")[0]).exists()
        return found(name, package) if there else None

    saved = {name: module for name, module in sys.modules.items() if name.split(".")[0] in MODULES}
    forget()
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    forget()
    sys.modules.update(saved)


def install(site, distribution, version, **modules):
    """Put a distribution on the path: its metadata and its modules' source, ``__`` in names standing for a dot."""
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    for name, source in modules.items():
        folder = site.joinpath(*name.split("__"))
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(source)
    importlib.invalidate_caches()


def detect(device):
    """By name."""
    found = detect_capabilities(device)
    assert tuple(capability.name for capability in found) == NAMES
    return {capability.name: capability for capability in found}


@pytest.mark.parametrize("device", [CPU, CUDA], ids=lambda device: device.kind)
def test_nothing_installed(device, site):
    found = detect(device)
    assert {capability.version for capability in found.values()} == {None}
    assert all(capability.detail.startswith("not installed; ") for capability in found.values())
    assert "layer spec 'local'" in found["transformer-engine"].detail
    assert "torch kernels" in found["apex"].detail
    assert "scaled_dot_product_attention" in found["flash-attn"].detail


def install_all(site):
    """Working packages of all three."""
    install(site, "transformer-engine", "2.9.0", transformer_engine="", transformer_engine__pytorch="")
    install(site, "apex", "0.1", apex="", apex__multi_tensor_apply="", apex__optimizers="", amp_C="")
    install(site, "flash-attn", "2.8.3", flash_attn="")


def test_everything_installed(site):
    install_all(site)
    found = detect(CUDA)
    assert {name: c.version for name, c in found.items()} == dict(zip(NAMES, ("2.9.0", "0.1", "2.8.3"), strict=True))
    assert "'te'" in found["transformer-engine"].detail and "instead" not in found["apex"].detail
    assert "scaled_dot_product_attention" in found["flash-attn"].detail, "the core attention does not call it"


def test_kernels_that_need_a_gpu_are_not_used_without_one(site):
    install_all(site)
    found = detect(CPU)
    fallbacks = ("layer spec 'local'", "torch kernels", "scaled_dot_product_attention")
    for name, fallback in zip(NAMES, fallbacks, strict=True):
        assert found[name].version is None, "nothing may take it for usable"
        assert "installed, needs a GPU; " in found[name].detail and fallback in found[name].detail


def test_packages_that_do_not_import(site):
    """Built for another torch or CUDA: the reason is on the report, on one line, with what runs in their place."""
    broken = "raise ImportError('undefined symbol: _ZN3c10\\nsecond line')"
    install(site, "transformer-engine", "2.9.0", transformer_engine="", transformer_engine__pytorch=broken)
    install(site, "apex", "0.1", apex="", apex__multi_tensor_apply="", apex__optimizers="")
    install(site, "flash-attn", "2.8.3", flash_attn="raise OSError('libcudart.so.12')")
    found = detect(CUDA)
    assert {capability.version for capability in found.values()} == {None}
    for name, reason, fallback in (
        ("transformer-engine", "ImportError: undefined symbol: _ZN3c10", "layer spec 'local'"),
        ("apex", "No module named 'amp_C'", "torch kernels"),
        ("flash-attn", "OSError: libcudart.so.12", "scaled_dot_product_attention"),
    ):
        assert reason in found[name].detail and fallback in found[name].detail
        assert "\n" not in found[name].detail


PYPI_APEX = "from pyramid.session import UnencryptedCookieSessionFactoryConfig"
"""The first line of the package that the package index calls apex, a toolkit for web applications."""


@pytest.mark.parametrize("source", ["", PYPI_APEX, "print 1", "raise RuntimeError('needs a web server')"])
def test_the_other_apex(source, site):
    install(site, "apex", "0.9.10.dev0", apex=source, apex__lib="")
    for device in (CPU, CUDA):
        found = detect(device)["apex"]
        assert found.version is None
        assert "an unrelated package named apex is installed (uninstall it); torch kernels instead" in found.detail


def test_the_report(site):
    install(site, "flash-attn", "2.8.3", flash_attn="")
    lines = capability_report(CPU).splitlines()
    assert [line.split()[0].rstrip(",") for line in lines] == ["device", "torch", *NAMES]
    assert lines[0].split(maxsplit=1)[1].startswith("cpu (gloo, ")
    assert f"torch {importlib.metadata.version('torch')}".split() == lines[1].split(",")[0].split()
    assert f"megatron-core {importlib.metadata.version('megatron-core')}" in lines[1]
    assert "2.8.3 installed, needs a GPU" in lines[-1]
