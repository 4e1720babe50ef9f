"""Whose warnings are shown."""

from __future__ import annotations

import logging
import warnings

import pytest

from fire_megatron.platform import quiet
from fire_megatron.platform.quiet import quiet_third_parties


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Levels and variables as before the test; no options of the interpreter."""
    loggers = [logging.getLogger(name) for name in quiet._TALKATIVE]
    levels = [logger.level for logger in loggers]
    for name in quiet._LEVELS:
        monkeypatch.setenv(name, "before")
        monkeypatch.delenv(name)
    monkeypatch.setattr(quiet.sys, "warnoptions", [])
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def shown(module, category=UserWarning, text="something"):
    """Whether a module's warning is."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.warn_explicit(text, category, "file.py", 1, module=module)
    return bool(seen)


def test_warnings_of_packages_are_hidden_and_those_of_the_user_shown():
    assert shown("torch.nn.modules")
    quiet_third_parties()
    for module in ("torch", "torch.nn.modules", "transformers.tokenization", "megatron.core.a", "fire_megatron.losses"):
        assert not shown(module), module
    for module in ("my_hooks", "torchlike", "__main__"):
        assert shown(module), module
        assert not shown(module, text="Apex is not installed. Falling back to torch"), module


def test_what_the_user_asks_for_is_shown(monkeypatch):
    monkeypatch.setattr(quiet.sys, "warnoptions", ["default"])
    quiet_third_parties()
    assert shown("torch.nn.modules")


def test_loggers_of_packages_tell_errors_only():
    quiet_third_parties()
    for name in ("transformers.tokenization_utils_base", "torch.utils.cpp_extension", "megatron.core.models"):
        assert not logging.getLogger(name).isEnabledFor(logging.WARNING), name
        assert logging.getLogger(name).isEnabledFor(logging.ERROR), name
    assert logging.getLogger("my_hooks").isEnabledFor(logging.WARNING)
