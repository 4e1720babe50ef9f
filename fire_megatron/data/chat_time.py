"""The time that chat templates are told: some write today's date into every prompt (Llama 3.2, gpt-oss)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import datetime
from types import SimpleNamespace


@contextlib.contextmanager
def chat_time(now: datetime) -> Iterator[None]:
    """Within the context, templates that ask for the time (``strftime_now``) are told ``now``: the same prompts on
    every rank, and whenever a run goes on."""
    from transformers.utils import chat_template_utils as module

    # A function of ours among the template's variables would reach it as text in some releases.
    real = module.datetime
    module.datetime = SimpleNamespace(now=lambda: now)
    try:
        yield
    finally:
        module.datetime = real
