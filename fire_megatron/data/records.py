"""One prompt."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt with the label that finds its teacher."""

    index: int
    """Place in the prompt set."""
    label: str
    """Label; one that has a teacher. Of a mixture, its labels joined by ``+``."""
    token_ids: tuple[int, ...]
    """Token ids, chat template included; at least one."""
    text: str
    """What the user wrote; of a chat, its last message."""
    mixture: tuple[tuple[str, float], ...] = ()
    """Labels with weights that sum to 1, where the row names several; else empty."""
    views: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Token ids that a teacher is given in place of these, by its name, where its chat template has other options."""

    def seen_by(self, teacher: str) -> tuple[int, ...]:
        """Token ids that a teacher is given."""
        return dict(self.views).get(teacher, self.token_ids)

    @property
    def shares(self) -> tuple[tuple[str, float], ...]:
        """The labels of the row with their weights."""
        return self.mixture or ((self.label, 1.0),)
