"""What the documentation names exists: links, their anchors, files of the repository, and the files of a step."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
PAGES += sorted((ROOT / "docs").glob("*.md")) + sorted((ROOT / "benchmarks").rglob("*.md"))

_LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")
_FILE = re.compile(r"(?<![\w./<{$*-])((?:[\w.-]+/)+[\w*-]+\.(?:py|sh|yaml|md))(?![\w*])")


def _anchor(heading: str) -> str:
    """GitHub's name of a heading."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@cache
def _anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
    return {_anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, flags=re.M)}


def _broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for link in _LINK.findall(text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(f"{page.relative_to(ROOT)}: {link}")
    return broken


def _missing_files(page: Path, text: str) -> list[str]:
    """Files that are neither at the root, nor in the package (``models/layers.py``), nor beside the page."""
    homes = (ROOT, ROOT / "fire_megatron", page.parent)
    return [
        f"{page.relative_to(ROOT)}: {name}"
        for name in sorted(set(_FILE.findall(text)))
        if not any(any(home.glob(name)) for home in homes)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files_exist(page):
    text = page.read_text("utf-8")
    missing = _broken_links(page, text) + _missing_files(page, text)
    assert not missing, "\n".join(missing)


def test_what_does_not_exist_is_found():
    page = ROOT / "README.md"
    for text in ("[a](docs/none.md)", "[a](#none)", "[a](docs/recipe.md#none)"):
        assert _broken_links(page, text), text
    for text in ("`train/none.py`", "see slurm/none.sh.", "python tools/none.py --out x", "`none/test_*.py`"):
        assert _missing_files(page, text), text


def test_every_page_is_in_the_readme():
    linked = set(_LINK.findall((ROOT / "README.md").read_text("utf-8")))
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= linked


PACKAGE = ROOT / "fire_megatron"
MOST = 12
"""Files that a step is followed through."""


def _imported(path: Path) -> set[Path]:
    """The package's modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    files = {ROOT / f"{name.replace('.', '/')}.py" for name in names}
    return {file for file in files if file.is_relative_to(PACKAGE) and file.exists()}


def _reached(path: Path) -> set[Path]:
    """A file and all that is imported by way of it."""
    reached, open_ = {path}, [path]
    while open_:
        fresh = _imported(open_.pop()) - reached
        reached |= fresh
        open_ += fresh
    return reached


def test_a_step_is_followed_through_few_files():
    """What ``train/loop.py`` imports is on docs/architecture.md, and what its table names, few files, is reached from
    the loop."""
    loop, page = PACKAGE / "train" / "loop.py", (ROOT / "docs" / "architecture.md").read_text("utf-8")
    section = page.split("## Follow one batch")[1].split("\n## ")[0]
    listed = {PACKAGE / name for name in re.findall(r"^\| \w+ \| `([\w/]+\.py)` \|", section, flags=re.M)}
    assert loop in listed and len(listed) <= MOST, sorted(map(str, listed))
    on_page = {PACKAGE / name for name in _FILE.findall(page)}
    assert _imported(loop) <= on_page, sorted(map(str, _imported(loop) - on_page))
    assert listed <= _reached(loop), sorted(map(str, listed - _reached(loop)))
