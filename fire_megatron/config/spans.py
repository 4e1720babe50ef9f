"""Spans: which ranks of the run hold a role, and which layers a pipeline stage."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fire_megatron.config.errors import RecipeProblem
from fire_megatron.config.kinds import Match

RANKS = Match(r"\d+(-\d+)?", "first-last, such as 8-15, or one rank in quotes")


@dataclass(frozen=True)
class Span:
    """Consecutive ranks."""

    first: int
    count: int

    @property
    def ranks(self) -> range:
        """All of them."""
        return range(self.first, self.first + self.count)

    def __str__(self) -> str:
        last = self.first + self.count - 1
        return f"rank {self.first}" if self.count == 1 else f"ranks {self.first}-{last}"

    def meets(self, other: Span) -> bool:
        """Whether a rank is in both."""
        return self.first < other.first + other.count and other.first < self.first + self.count


def parse_span(text: str | None, world_size: int) -> Span:
    """The span that a role's ``ranks`` names (None: all ranks of the run), whether or not it fits in the run."""
    if text is None:
        return Span(0, world_size)
    first, last = re.fullmatch(r"(\d+)(?:-(\d+))?", text).groups()  # type: ignore[union-attr]
    return Span(int(first), int(last or first) - int(first) + 1)


def span_problems(ranks: Mapping[str, str | None], world_size: int) -> Iterator[RecipeProblem]:
    """What is wrong with the spans of the roles.

    Args:
        ranks: ``ranks`` of each role by its key; the student's is ``student``.
        world_size: ranks of the run.
    """
    spans = {key: parse_span(text, world_size) for key, text in ranks.items()}
    sound = True
    for key, span in spans.items():
        text = None
        if span.count < 1:
            text = f"{ranks[key]} ends before it starts; write first-last"
        elif span.first + span.count > world_size:
            text = (
                f"{ranks[key]} reaches beyond the run's {world_size} ranks (0-{world_size - 1}); start more or lower it"
            )
        elif key == "student" and span.first:
            text = (
                f"{ranks[key]} does not start at rank 0, which writes metrics and checkpoints; give the student the "
                "first ranks and the teachers those after them"
            )
        if text:
            sound = False
            yield RecipeProblem(f"{key}.ranks", text)
    if not sound:
        return
    idle = sorted(set(range(world_size)) - {rank for span in spans.values() for rank in span.ranks})
    if idle:
        shown = ", ".join(map(str, idle[:8])) + (" ..." if len(idle) > 8 else "")
        yield RecipeProblem(
            "student.ranks",
            f"{len(idle)} of the run's {world_size} ranks hold no role ({shown}); give them to the student or a "
            "teacher, or start fewer",
        )


def pipeline_stages(num_layers: int, pipeline: int) -> list[int]:
    """Layers of each stage: even where they divide; otherwise the first and last stage, which also embed and
    project, take what the even middle stages leave."""
    assert pipeline <= num_layers
    if pipeline == 1:
        return [num_layers]
    middle = -(-num_layers // pipeline)
    if num_layers - middle * (pipeline - 2) < 2:
        middle = num_layers // pipeline
    ends = num_layers - middle * (pipeline - 2)
    return [ends - ends // 2, *[middle] * (pipeline - 2), ends // 2]
