"""The messages of docs/troubleshooting.md are those that the package has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
FOREIGN = {"CUDA out of memory", "More"}
"""A message of torch's, and no message."""
MESSAGES = [heading for heading in re.findall(r"^## (.+)$", PAGE, re.MULTILINE) if heading not in FOREIGN]


def sources():
    """Text of the package, with strings that go on in the next line joined."""
    for path in sorted((ROOT / "fire_megatron").rglob("*.py")):
        yield re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8"))


def test_there_are_ten():
    assert len(MESSAGES) >= 10


@pytest.mark.parametrize("message", MESSAGES)
def test_the_package_says_so(message):
    assert any(message in text for text in sources())
