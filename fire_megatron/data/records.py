"""One prompt."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt with the label that finds its teacher."""

    index: int
    """Place in the prompt set."""
    label: str
    """Label; one that has a teacher."""
    token_ids: tuple[int, ...]
    """Token ids, chat template included; at least one."""
    text: str
    """What the user wrote; of a chat, its last message."""
