"""The image for GPU nodes: what it pins is what the package asks for, and what it copies is there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")


def name(requirement):
    return re.sub(r"[-_.]+", "-", requirement.name).lower()


def pins():
    lines = (ROOT / "docker" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in found), "one release each"
    return {name(pin): str(pin.specifier).removeprefix("==") for pin in found}


def test_every_package_is_pinned_within_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = re.search(r'pip install -e "\.\[([\w,]+)\]"', DOCKERFILE)[1].split(",")
    wanted = [*project["dependencies"], *(line for key in extras for line in project["optional-dependencies"][key])]
    wanted += project["optional-dependencies"]["gpu"]
    pinned = pins()
    for requirement in map(Requirement, wanted):
        if name(requirement) == "torch":  # the base image's
            assert "torch" not in pinned
            continue
        assert requirement.specifier.contains(pinned[name(requirement)]), requirement


def test_the_base_is_one_release():
    assert re.search(r"^FROM nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3$", DOCKERFILE, re.MULTILINE)


def test_what_it_copies_is_there_and_not_ignored():
    shown = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sources = [word for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]]
    assert len(sources) >= 6
    for source in sources:
        assert (ROOT / source).exists() and f"!{source}" in shown, source
