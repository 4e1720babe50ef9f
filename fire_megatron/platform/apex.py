"""NVIDIA's apex, and what else has that name: megatron-core imports whatever is called ``apex`` when it is imported.

NVIDIA's (https://github.com/NVIDIA/apex) is not on PyPI; the ``apex`` there is a toolkit for web applications. It may
fail in megatron-core's imports with an error of any kind, or pass for NVIDIA's. So it is refused, before megatron-core
is imported. A mere folder of that name (a checkout in the working directory, say) imports as an empty package; it is
kept out of megatron-core's sight, and so is NVIDIA's where it cannot work: its optimizers import without their CUDA
extension, and raise when they are made.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from fire_megatron.config.errors import UserError

HOME = "https://github.com/NVIDIA/apex"
EXTENSION = "amp_C"
"""The module of CUDA kernels that NVIDIA's apex computes with; it can be installed without."""
_OWN_MODULES = ("multi_tensor_apply", "optimizers")
"""Of NVIDIA's, since its beginnings."""


@dataclass(frozen=True)
class Apex:
    """What ``import apex`` would find."""

    place: Path
    """The package's folder, or the file of a module."""
    is_nvidias: bool
    """Told by its own modules."""
    is_folder: bool
    """Whether it is no package at all but a folder of that name on the path."""
    version: str | None
    """Of the distribution that it belongs to; None where there is none."""

    def __str__(self) -> str:
        return f"apex {self.version or '(of no distribution)'} in {self.place}"


def find_apex() -> Apex | None:
    """Look for it without importing it: the other one may raise, or do anything. None when there is none."""
    spec = _find_spec()
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or ())
    own = bool(folders) and all(PathFinder.find_spec(f"apex.{name}", folders) for name in _OWN_MODULES)
    place = Path(folders[0] if folders else spec.origin or "?")
    return Apex(place, is_nvidias=own, is_folder=bool(folders) and spec.origin is None, version=_version(place, own))


def _find_spec() -> ModuleSpec | None:
    """As ``importlib.util.find_spec("apex")``, also after :func:`hide_unusable_apex`."""
    importlib.invalidate_caches()
    specs = (finder.find_spec("apex", None) for finder in sys.meta_path if hasattr(finder, "find_spec"))
    return next((spec for spec in specs if spec is not None), None)


def _version(place: Path, own: bool) -> str | None:
    """Of the distribution at this place; where the package is NVIDIA's, also of an editable one, which has none."""
    editable = None
    for distribution in importlib.metadata.distributions(name="apex"):
        itself = Path(str(distribution.locate_file(place.name)))
        if itself.resolve() == place.resolve():
            return distribution.version
        if own and not itself.exists():
            editable = distribution.version
    return editable


def refuse_other_apex() -> None:
    """Call before megatron-core is imported.

    Raises:
        UserError: an apex that is not NVIDIA's would be imported.
    """
    apex = find_apex()
    if apex is None or apex.is_nvidias or apex.is_folder:
        return
    what = f"the distribution apex {apex.version} in {apex.place.parent}" if apex.version else f"{apex.place}"
    remedy = "pip uninstall apex" if apex.version else "rename or remove it, or take it off PYTHONPATH"
    raise UserError(
        f"{what} is not NVIDIA's apex but another package of that name (the one on PyPI is unrelated), and "
        f"megatron-core would import it: {remedy}. NVIDIA's is optional and not on PyPI; it is built from {HOME}"
    )


def import_problem(module: str) -> str | None:
    """None when ``module`` imports, else the reason that it does not, on one line."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken binary extension raises whatever it likes
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def hide_unusable_apex(*, on_gpu: bool) -> None:
    """Let megatron-core's ``import apex`` fail where the package would be of no use, so that it takes what it takes
    without one. A no-op once somebody has imported it."""
    apex = find_apex()
    if apex is not None and (apex.is_folder or not on_gpu or import_problem(EXTENSION) is not None):
        sys.modules.setdefault("apex", None)  # type: ignore[arg-type]
