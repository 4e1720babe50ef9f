"""Some of a step's answers in full, for people: the lines of ``samples.jsonl``.

Shapes: B rows of this replica, R longest response, R_i response tokens of row i.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from fire_megatron.data.rollouts import Rollouts, Scores
from fire_megatron.data.token_texts import token_texts
from fire_megatron.fire.apply import EMPTY, NONFINITE
from fire_megatron.fire.batch import Selection
from fire_megatron.fire.statistics import row_means

_DIGITS = 4
"""Significant digits of a token's numbers: a line is some 50 bytes a token."""


def choose_rows(kept: Sequence[bool], most: int) -> list[int]:
    """At most ``most`` rows, in order: the first dropped ones for up to half of them, the first kept ones for the rest.
    Where there are too few of one kind, the other takes their places."""
    by_kind = {kind: [i for i, keep in enumerate(kept) if keep == kind] for kind in (False, True)}
    dropped = min(len(by_kind[False]), max(most // 2, most - len(by_kind[True])))
    return sorted(by_kind[False][:dropped] + by_kind[True][: most - dropped])


def sample_lines(
    rollouts: Rollouts,
    scores: Scores,
    selection: Selection,
    decode: Callable[[Sequence[int]], str],
    *,
    most: int,
) -> Iterator[dict[str, Any]]:
    """Lines of ``samples.jsonl`` on up to ``most`` of this replica's answers, made one by one as they are asked for.

    Args:
        rollouts: B answers.
        scores: what the teachers said of them.
        selection: what the hooks decided on them; weights and details are written as they are there.
        decode: text of token ids.
        most: see :func:`choose_rows`.
    """
    for i in choose_rows(selection.keep_B.tolist(), most):
        ids, log_prob = rollouts.responses[i].tolist(), scores.log_probs[i]
        texts = token_texts(ids, decode)
        by_row, by_token = _details(selection, i, len(ids))
        yield {
            **by_row,
            "row": rollouts.row_ids[i],
            "label": rollouts.prompts[i].label,
            "teacher": scores.teachers[i],
            "prompt": rollouts.prompts[i].text,
            "response": "".join(texts),
            "tokens": len(ids),
            "truncated": rollouts.truncated[i],
            "kept": selection.reason[i] is None,
            "reason": selection.reason[i],
            "mean_log_prob": float(row_means(log_prob[None], torch.ones(1, len(ids), dtype=torch.bool))),
            "reverse_kl": float((rollouts.log_probs[i] - log_prob).sum()),
            "by_token": {
                "text": texts,
                **by_token,
                "teacher_log_prob": _short(log_prob),
                "student_log_prob": _short(rollouts.log_probs[i]),
            },
        }


def _details(selection: Selection, row: int, length: int) -> tuple[dict[str, float], dict[str, list[float]]]:
    """What the hooks tell of a row, and of each of its tokens; the weights of a dropped row are of no update."""
    if selection.reason[row] in (EMPTY, NONFINITE):  # hooks have not seen its tokens
        return {}, {}
    by_row = {name: float(table[row]) for name, table in selection.details.items() if table.dim() == 1}
    tables = {name: table for name, table in selection.details.items() if table.dim() == 2}
    if selection.reason[row] is None:
        tables = {"weight": selection.weight_BR, **tables}
    return by_row, {name: _short(table[row, :length]) for name, table in tables.items()}


def _short(values: torch.Tensor) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in values.tolist()]
