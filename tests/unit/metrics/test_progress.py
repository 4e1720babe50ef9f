"""Progress on a terminal and in a file."""

from __future__ import annotations

import io
import sys

import pytest

from fire_megatron.metrics import progress
from fire_megatron.metrics.progress import progress_bar


class Screen(io.StringIO):
    """Standard error that may be a terminal."""

    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


def shown(monkeypatch, terminal, **options):
    """What is written while 20 things are counted, and what they were."""
    screen = Screen(terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    counted = list(progress_bar(range(20), desc="answers", unit="answer", **options))
    return screen.getvalue(), counted


def test_a_file_gets_whole_lines(monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS", 1e-9)
    text, counted = shown(monkeypatch, terminal=False)
    assert counted == list(range(20)) and "\r" not in text
    lines = text.splitlines()
    assert len(lines) >= 10 and all(line.startswith("answers: ") and "/20 [" in line for line in lines)


def test_what_is_soon_done_says_nothing_in_a_file(monkeypatch):
    assert shown(monkeypatch, terminal=False) == ("", list(range(20)))


def test_a_terminal_gets_a_bar(monkeypatch):
    text, counted = shown(monkeypatch, terminal=True)
    assert counted == list(range(20)) and text.startswith("\ranswers:") and "20/20" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_where_it_is_not_to_be_shown(monkeypatch, terminal):
    monkeypatch.setattr(progress, "_SECONDS", 1e-9)
    assert shown(monkeypatch, terminal, show=False) == ("", list(range(20)))


def test_counting_by_hand(monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS", 1e-9)
    screen = Screen(terminal=False)
    monkeypatch.setattr(sys, "stderr", screen)
    with progress_bar(unit=" rows", desc="reading") as bar:
        for _ in range(3):
            bar.update()
    assert "3 rows" in screen.getvalue() and "\r" not in screen.getvalue()
