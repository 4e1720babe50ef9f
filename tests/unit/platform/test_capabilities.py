"""The report of fused kernels, against packages that are put on the path for it."""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
from nvml import FakeNvml, NVMLError

from fire_megatron.config.errors import UserError
from fire_megatron.platform import apex
from fire_megatron.platform.capabilities import capability_report, detect_capabilities
from fire_megatron.platform.device import Device

CPU, CUDA = Device("cpu"), Device("cuda")
NAMES = ("transformer-engine", "apex", "flash-attn")
DISTRIBUTIONS = (*NAMES, "flash-attn-3")
MODULES = ("transformer_engine", "apex", "amp_C", "flash_attn", "flash_attn_interface")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty folder of packages, searched first; any real ones of these names are hidden."""

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] in MODULES]:
            del sys.modules[name]

    real = importlib.metadata.version

    def version(name):
        if name in DISTRIBUTIONS and not list(tmp_path.glob(f"{name.replace('-', '_')}-[0-9]*")):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    saved = {name: module for name, module in sys.modules.items() if name.split(".")[0] in MODULES}
    forget()
    monkeypatch.setattr(importlib.metadata, "version", version)
    found = apex._find_spec
    monkeypatch.setattr(apex, "_find_spec", lambda: found() if list(tmp_path.glob("apex*")) else None)
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
        folder.mkdir(parents=True, exist_ok=True)
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
    assert "'te'" in found["transformer-engine"].detail
    assert "Transformer Engine's optimizer comes first" in found["apex"].detail, "so megatron-core imports them"
    assert "Transformer Engine's attention may choose it" in found["flash-attn"].detail


def test_without_transformer_engine(site):
    install(site, "apex", "0.1", apex="", apex__multi_tensor_apply="", apex__optimizers="", amp_C="")
    install(site, "flash-attn-3", "3.0.0", flash_attn_interface="")
    found = detect(CUDA)
    assert (found["apex"].version, found["apex"].detail) == ("0.1", "fused optimizer kernels")
    assert found["flash-attn"].version == "3.0.0"
    assert "only Transformer Engine's attention would call it" in found["flash-attn"].detail


def test_transformer_engine_without_apex(site):
    install(site, "transformer-engine", "2.9.0", transformer_engine="", transformer_engine__pytorch="")
    assert detect(CUDA)["apex"].detail == "not installed; Transformer Engine kernels instead"


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


OTHERS = ["", PYPI_APEX, "print 1", "raise RuntimeError('needs a web server')"]


@pytest.mark.parametrize("source", OTHERS)
def test_the_other_apex_is_refused(source, site):
    install(site, "apex", "0.9.10.dev0", apex=source, apex__lib="")
    with pytest.raises(UserError) as refused:
        apex.refuse_other_apex()
    assert str(refused.value).startswith(f"the distribution apex 0.9.10.dev0 in {site} is not NVIDIA's apex")
    assert "pip uninstall apex" in str(refused.value) and "https://github.com/NVIDIA/apex" in str(refused.value)
    for device in (CPU, CUDA):
        found = detect(device)["apex"]
        assert found.version is None
        assert "an unrelated package" in found.detail and "uninstall it; torch kernels instead" in found.detail
    assert "apex" not in sys.modules, "it is not imported to be looked at"


def test_a_package_of_that_name_without_a_distribution_is_refused(site):
    """pip could not uninstall it. A module of one file is no better."""
    install(site, "something-else", "1.0", apex="")
    for place in (site / "apex", site / "apex.py"):
        with pytest.raises(UserError) as refused:
            apex.refuse_other_apex()
        assert f"{place} is not NVIDIA's" in str(refused.value) and "pip uninstall" not in str(refused.value)
        assert "rename or remove it" in str(refused.value)
        shutil.rmtree(site / "apex", ignore_errors=True)
        (site / "apex.py").write_text("")


def test_a_mere_folder_is_reported_and_kept_from_megatron(site):
    (site / "apex" / "apex").mkdir(parents=True)
    apex.refuse_other_apex()
    assert f"not installed (a mere folder, {site / 'apex'}, is ignored)" in detect(CUDA)["apex"].detail
    assert importlib.import_module("apex").__path__, "this is what megatron-core would take for apex"
    del sys.modules["apex"]
    apex.hide_unusable_apex(on_gpu=True)
    with pytest.raises(ImportError):
        importlib.import_module("apex")
    assert "is ignored" in detect(CUDA)["apex"].detail, "the report comes later"


@pytest.mark.parametrize(
    ("on_gpu", "extension", "hidden"), [(True, True, False), (True, False, True), (False, 1, True)]
)
def test_nvidias_apex_is_hidden_where_it_cannot_work(on_gpu, extension, hidden, site):
    """Its FusedAdam imports without the extension and raises when it is made."""
    install(site, "apex", "0.1", apex="", apex__multi_tensor_apply="", apex__optimizers="")
    if extension:
        install(site, "amp-C", "0", amp_C="")
    apex.refuse_other_apex()
    apex.hide_unusable_apex(on_gpu=on_gpu)
    assert ("apex" in sys.modules) == hidden
    assert "0.1" in (detect(CUDA)["apex"].version or detect(CUDA)["apex"].detail)


def test_what_somebody_has_imported_stays(site):
    install(site, "apex", "0.1", apex="", apex__multi_tensor_apply="", apex__optimizers="")
    module = importlib.import_module("apex")
    apex.hide_unusable_apex(on_gpu=False)
    assert sys.modules["apex"] is module


def test_the_version_is_that_of_the_package_that_would_be_imported(site, monkeypatch):
    """NVIDIA's, from a checkout on PYTHONPATH or installed as editable, before another distribution of that name."""
    nvidias, other = site / "apex-checkout", site / "site"
    nvidias.mkdir()
    other.mkdir()
    (site / "apex").mkdir()  # so that the fixture hides nothing
    install(other, "apex", "0.9.10.dev0", apex="")
    install(nvidias, "checkout", "0", apex="", apex__multi_tensor_apply="", apex__optimizers="")
    for folder in (other, nvidias):
        monkeypatch.syspath_prepend(folder)
    apex.refuse_other_apex()
    assert "unknown installed, needs a GPU" in detect(CPU)["apex"].detail
    shutil.rmtree(other)
    other.mkdir()
    install(other, "apex", "0.1")
    assert "0.1 installed, needs a GPU" in detect(CPU)["apex"].detail


def test_setup_never_asks_for_apex():
    """What pip would install is the other one."""
    wanted = tomllib.loads((Path(__file__).resolve().parents[3] / "pyproject.toml").read_text())["project"]
    everything = [*wanted["dependencies"], *itertools.chain(*wanted["optional-dependencies"].values())]
    names = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in everything}
    assert "nvidia-ml-py" in names and not {name for name in names if name.split("-")[-1] == "apex"}


def test_the_report(site):
    install(site, "flash-attn", "2.8.3", flash_attn="")
    lines = capability_report(CPU).splitlines()
    assert [line.split()[0].rstrip(",") for line in lines] == ["device", "torch", *NAMES, "triton", "nvidia-ml-py"]
    assert lines[0].split(maxsplit=1)[1].startswith("cpu (gloo, ")
    assert f"torch {importlib.metadata.version('torch')}".split() == lines[1].split(",")[0].split()
    assert f"megatron-core {importlib.metadata.version('megatron-core')}" in lines[1]
    assert "2.8.3 installed, needs a GPU" in lines[-3]
    assert lines[-1].endswith("installed, needs a GPU; no gpu/... metrics")


def test_the_report_of_nvml(site, monkeypatch):
    monkeypatch.setattr(Device, "describe", lambda self: "a GPU")
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)

    def line():
        return capability_report(CUDA).splitlines()[-1]

    version = importlib.metadata.version("nvidia-ml-py")
    assert line().split() == f"nvidia-ml-py {version}: gpu/... metrics, unless metrics.gpu_interval is 0".split()
    assert nvml.running == 0
    nvml.errors["Init"] = NVMLError("NVML Shared Library Not Found")
    assert "the driver does not answer (NVML Shared Library Not Found); no gpu/... metrics" in line()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "does not import" in line()
