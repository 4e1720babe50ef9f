"""Imports point downward through the layers, and each seam has one owner.

The rules look at the syntax tree, so that words in comments and docstrings do not count. Imports inside functions
do count: a late import is no way around a layer.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import call

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "fire_megatron"

LAYERS: tuple[tuple[str, ...], ...] = (
    ("config",),
    ("platform",),
    ("kernels",),
    ("metrics",),
    ("parallel",),
    ("losses",),
    ("fire",),
    ("data",),
    ("models",),
    ("checkpoint",),
    ("teachers", "rollout"),
    ("evaluation",),
    ("train",),
    ("prepare", "plan", "report"),
    ("cli",),
)
"""From the bottom up; layers of one row do not import each other."""
HEIGHT = {name: height for height, row in enumerate(LAYERS) for name in row}

LAUNCHER_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def _layer(path: str) -> str:
    """The layer of a file, given from the repository's root; ``""`` outside the layers.

    ``__main__.py`` only hands over to the command line, so it counts as a part of that.
    """
    parts = Path(path).parts
    if parts[0] != PACKAGE or len(parts) < 3:
        return ""
    return "cli" if parts[-1] == "__main__.py" else parts[1]


def _imports(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported; for ``from a import b`` that is ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = Path(path).parts[: -node.level] if node.level else ()
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def _dotted(node: ast.AST) -> str:
    """``a.b.c`` of an attribute chain; empty when it does not start at a name."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(names)]) if isinstance(node, ast.Name) else ""


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _layering(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    here = _layer(path)
    if not here:
        return
    if here not in HEIGHT:
        yield 1, f"{here}/ is not one of the layers"
        return
    for line, name in _imports(path, tree):
        parts = name.split(".")
        there = parts[1] if parts[0] == PACKAGE and len(parts) > 1 else here
        if there in HEIGHT and there != here and HEIGHT[there] >= HEIGHT[here]:
            yield line, f"{here}/ imports {there}/, which is not below it"


def _torch_cuda(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    if _layer(path) == "platform":
        return
    yield from ((line, "torch.cuda outside platform/") for line, name in _imports(path, tree) if _cuda(name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _dotted(node) == "torch.cuda":
            yield node.lineno, "torch.cuda outside platform/"


def _cuda(name: str) -> bool:
    return _within(name, "torch.cuda")


def _launcher(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    if _layer(path) == "platform":
        return
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if text in LAUNCHER_VARIABLES or (text.startswith("SLURM_") and text.isupper()):
            yield node.lineno, f"launcher variable {text} outside platform/"


def _argv(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    if _layer(path) == "cli" or Path(path).parts[0] == "tools":
        return
    readers = ("sys.argv", "argparse", "click", "getopt")
    for line, name in _imports(path, tree):
        if any(_within(name, reader) for reader in readers):
            yield line, "the command line is read outside cli/ and tools/"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _dotted(node) in ("sys.argv", "sys.orig_argv"):
            yield node.lineno, "the command line is read outside cli/ and tools/"


def _pure(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    forbidden = {"fire": ("megatron",), "losses": ("megatron",), "config": ("torch", "megatron", "numpy")}
    for line, name in _imports(path, tree):
        for module in forbidden.get(_layer(path), ()):
            if _within(name, module):
                yield line, f"{_layer(path)}/ imports {module}"


def _removed(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """What Transformer Engine 2.20 marks for removal."""
    engine = "transformer_engine.pytorch"
    homes = (engine, f"{engine}.quantization")
    old = (f"{engine}.fp8", *(f"{home}.fp8_{name}" for home in homes for name in ("autocast", "model_init")))
    chains = ((node.lineno, _dotted(node)) for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    for line, name in (*_imports(path, tree), *chains):
        if any(_within(name, gone) for gone in old):
            yield line, f"{name} is going to be removed; use {engine}.quantization, autocast, quantized_model_init"


_EMULATION = tuple(f"{PACKAGE}.models.fp8.{name}" for name in ("emulation", "linear", "quantize"))
_BELOW_REPORT = ("config", "platform", "metrics")


def _satellites(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """A run imports the emulation of FP8 only where it is asked for; a report reads a run by what it has written."""
    for node in tree.body if not path.startswith(f"{PACKAGE}/models/fp8/") and _layer(path) else ():
        for line, name in _imports(path, node) if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
            if any(_within(name, module) for module in _EMULATION):
                yield line, f"{name} is imported for runs without emulation too"
    for line, name in _imports(path, tree) if _layer(path) == "report" else ():
        parts = name.split(".")
        if parts[0] == PACKAGE and parts[1:] and parts[1] in HEIGHT and parts[1] not in (*_BELOW_REPORT, "report"):
            yield line, f"report/ imports {parts[1]}/, and reads what runs have written only"


RULES = (_layering, _satellites, _torch_cuda, _launcher, _argv, _pure, _removed)


def violations(path: str, source: str) -> list[str]:
    """What a file does against the rules, as ``path:line: text``."""
    tree = ast.parse(source, filename=path)
    return [f"{path}:{line}: {text}" for rule in RULES for line, text in rule(path, tree)]


def test_the_package_keeps_the_rules() -> None:
    files = [path for folder in (PACKAGE, "tools") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 10
    found = [text for path in files for text in violations(str(path.relative_to(ROOT)), path.read_text("utf-8"))]
    for path in [path for folder in ("tests", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]:
        found += [f"{path}:{line}: {text}" for line, text in _removed(str(path), ast.parse(path.read_text("utf-8")))]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("fire_megatron/config/a.py", "from fire_megatron.platform import World"),
        ("fire_megatron/config/a.py", "import torch"),
        ("fire_megatron/config/a.py", "from torch.distributed import ReduceOp"),
        ("fire_megatron/losses/a.py", "import fire_megatron.fire.hooks"),
        ("fire_megatron/losses/a.py", "from fire_megatron import fire"),
        ("fire_megatron/losses/a.py", "from ..fire import hooks"),
        ("fire_megatron/losses/a.py", "from .. import fire"),
        ("fire_megatron/losses/a.py", "def f():\n    from fire_megatron.train.lifecycle import Trainer"),
        ("fire_megatron/losses/a.py", "from megatron.core import parallel_state"),
        ("fire_megatron/fire/deep/a.py", "import megatron"),
        ("fire_megatron/rollout/a.py", "from fire_megatron.teachers.router import routes"),
        ("fire_megatron/teachers/a.py", "from fire_megatron.rollout.engine import Engine"),
        ("fire_megatron/train/a.py", "from fire_megatron.cli.train import main"),
        *(
            (f"fire_megatron/{step}/a.py", f"def f():\n    from fire_megatron.{satellite}.a import b")
            for step in ("train", "rollout", "teachers", "losses", "fire", "data", "models", "checkpoint")
            for satellite in ("prepare", "plan", "report")
        ),
        ("fire_megatron/plan/a.py", "from fire_megatron.report.page import write_report"),
        ("fire_megatron/train/a.py", "from fire_megatron.models.fp8.emulation import EmulatedFP8"),
        ("fire_megatron/models/gpt.py", "from fire_megatron.models.fp8 import linear"),
        ("fire_megatron/report/a.py", "from fire_megatron.checkpoint.folder import read_marker"),
        ("fire_megatron/surprise/a.py", "x = 1"),
        ("fire_megatron/models/a.py", "import torch\ntorch.cuda.synchronize()"),
        ("fire_megatron/models/a.py", "import torch.cuda"),
        ("fire_megatron/models/a.py", "from torch import cuda"),
        ("fire_megatron/models/a.py", "from torch.cuda import Stream"),
        ("tools/a.py", "import torch\nx = torch.cuda.is_available()"),
        ("fire_megatron/train/a.py", "import os\nos.environ['WORLD_SIZE']"),
        ("fire_megatron/train/a.py", "import os\nos.environ.get('SLURM_PROCID', 0)"),
        ("fire_megatron/cli/a.py", "from os import getenv\ngetenv('RANK')"),
        ("fire_megatron/train/a.py", "import sys\nname = sys.argv[1]"),
        ("fire_megatron/train/a.py", "from sys import argv"),
        ("fire_megatron/config/a.py", "import argparse"),
        ("fire_megatron/models/a.py", "from transformer_engine.pytorch import fp8_autocast"),
        ("fire_megatron/models/a.py", "from transformer_engine.pytorch.fp8 import FP8GlobalStateManager"),
        ("fire_megatron/models/a.py", "import transformer_engine\ntransformer_engine.pytorch.fp8_model_init()"),
    ],
)
def test_a_file_against_the_rules_is_found(path: str, source: str) -> None:
    assert violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("fire_megatron/__init__.py", "from fire_megatron.train import loop"),
        ("fire_megatron/train/a.py", "from fire_megatron.rollout.engine import Engine\nfrom . import step"),
        ("fire_megatron/train/__main__.py", "from fire_megatron.cli.train import main"),
        ("fire_megatron/platform/a.py", "import os, torch\ntorch.cuda.synchronize()\nos.environ['RANK']"),
        ("fire_megatron/models/a.py", "'''torch.cuda, RANK and sys.argv in a docstring'''\n# import megatron"),
        ("fire_megatron/losses/a.py", "import fire_megatron.parallel.collectives\nimport torch"),
        ("fire_megatron/models/a.py", "def f():\n    from fire_megatron.models.fp8.emulation import EmulatedFP8"),
        ("fire_megatron/models/fp8/a.py", "from fire_megatron.models.fp8.quantize import quantize"),
        ("fire_megatron/report/a.py", "from fire_megatron.metrics.jsonl import finite\nfrom .read import read_run"),
        ("fire_megatron/cli/a.py", "import argparse, sys\nsys.argv"),
        ("tools/a.py", "import argparse"),
        ("fire_megatron/models/a.py", "from transformer_engine.pytorch import autocast, is_fp8_available"),
    ],
)
def test_a_file_within_the_rules_passes(path: str, source: str) -> None:
    assert violations(path, source) == []


LIGHT = ("config.checks", "data.prompts", "data.order", "prepare.prompt_file", "report.page", "cli.main")
"""What recipes are checked with, and what commands start with that need no model."""


def test_what_needs_no_model_starts_without_the_seconds_that_torch_takes() -> None:
    imports = ", ".join(f"fire_megatron.{name}" for name in LIGHT)
    heavy = "{'torch', 'megatron', 'transformers', 'sentencepiece', 'pyarrow'}"
    assert call("-c", f"import sys, {imports}; print(sorted({heavy} & set(sys.modules)))") == "[]\n"
