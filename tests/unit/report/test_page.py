"""The file that is written."""

from __future__ import annotations

import json
import os
import re
import sys

import pytest
from report_page import blocks

from fire_megatron.config.errors import UserError
from fire_megatron.report.page import write_report
from fire_megatron.report.read import read_run

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)> $title ü \u2028"


@pytest.fixture
def runs(tmp_path):
    """``runs(name, ...)``: folders with a step and a nasty sample, read."""

    def make(*names):
        made = []
        for number, name in enumerate(names):
            folder = tmp_path / f"{number}"
            folder.mkdir()
            (folder / "recipe.yaml").write_text(json.dumps({"run": {"name": name, "steps": 2}}))
            (folder / "metrics.jsonl").write_text(f'{{"step": 1, "loss": {number}, "x": 1e999, "time/step": 2.5}}\n')
            line = {"step": 1, "row": 0, "teacher": NASTY, "reason": NASTY, "prompt": NASTY, "response": NASTY}
            (folder / "samples.jsonl").write_text(json.dumps(line) + "\n")
            made.append(read_run(folder, max_samples=5, max_tokens=100))
        return made

    return make


def test_what_came_from_the_run_is_only_in_the_blocks(runs, tmp_path):
    target = tmp_path / "page.html"
    write_report(runs(NASTY), target)
    text = target.read_text(encoding="utf-8")
    assert "<script>alert" not in text and "<img" not in text and text.count("<script nonce=") == 1
    assert "&lt;/script&gt;" in text.partition("</title>")[0]
    found = blocks(target)
    assert found["trajectory-0"] == {"prompt": NASTY, "texts": [NASTY], "numbers": {}}
    report = found["report"]
    assert report["runs"][0]["name"] == NASTY and report["trajectories"][0]["teacher"] == NASTY
    assert report["runs"][0]["seconds"] == 2.5 and report["runs"][0]["last"]["x"] is None, "no infinity in JSON"
    assert not re.search(r"https?://|@import|url\(|<[^>]*\b(src|href)=", text), "nothing to be loaded"


def test_runs_of_one_name_are_told_apart(runs, tmp_path):
    write_report(runs("a", "b", "a"), tmp_path / "page.html")
    names = [run["name"] for run in blocks(tmp_path / "page.html")["report"]["runs"]]
    assert names == ["a (0)", "b", "a (2)"]


def test_without_plotly_the_error_says_what_to_install(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(UserError, match=r"needs plotly.*pip install"):
        write_report(runs("a"), tmp_path / "page.html")


def test_a_write_that_fails_leaves_the_old_page(runs, tmp_path, monkeypatch):
    target = tmp_path / "page.html"
    target.write_text("old")
    read = runs("a")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"page.html: cannot be written \(No space left on device\).*--out"):
        write_report(read, target)
    assert target.read_text() == "old" and not list(tmp_path.glob(".page*"))
    monkeypatch.undo()
    with pytest.raises(UserError, match="No such file"):
        write_report(read, tmp_path / "none" / "page.html")
