"""From prompt files to tokenized, labelled prompts. Every row is checked; what is wrong is named by file and line."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fire_megatron.config.data import DataConfig, SourceConfig
from fire_megatron.config.errors import DataError
from fire_megatron.data.encoder import Encoder
from fire_megatron.data.records import Prompt
from fire_megatron.data.rows import (
    Reason,
    RowError,
    as_chat,
    check_weights,
    checked_chat,
    checked_text,
    look_like_answers,
    lookup,
    read_rows,
    shown,
)
from fire_megatron.data.tokenizer import Tokenizer

_EXAMPLES = 5
"""Wrong rows named one by one before the rest is counted."""


@dataclass(frozen=True)
class PromptReport:
    """What was read."""

    by_label: dict[str, int]
    """Prompts kept, by label."""
    too_long: int
    """Prompts dropped for their length."""
    repeated: int
    """Prompts kept that are the same as an earlier one."""
    token_percentiles: dict[int, int]
    """Length in tokens of the kept prompts at the 50th, 90th and 100th percentile."""

    def __str__(self) -> str:
        labels = ", ".join(f"{label} {count}" for label, count in sorted(self.by_label.items()))
        lengths = ", ".join(f"p{p} {n}" for p, n in self.token_percentiles.items())
        dropped = f"; {self.too_long} too long and dropped" if self.too_long else ""
        again = f"; {self.repeated} the same as earlier ones" if self.repeated else ""
        return f"{sum(self.by_label.values())} prompts ({labels}); tokens {lengths}{dropped}{again}"


class _NoTeacher(RowError):
    """A row's label has no teacher."""

    def __init__(self, label: Any, known: str, what: str = "") -> None:
        what = what or f"label {shown(label)} has no teacher; add it to a teacher's labels, or"
        super().__init__(Reason.UNKNOWN_LABEL, f"{what} use one of: {known}")
        self.label = label


def _messages(row: Mapping[str, Any], config: DataConfig) -> list[dict[str, Any]]:
    """The chat that a row stands for. Raises DataError saying what the row lacks."""
    text = as_chat(lookup(row, config.prompt_key))
    if isinstance(text, list) and isinstance(lookup(row, config.prompt_key), str):
        return checked_chat(text, config.prompt_key)
    if text is not None:
        return [{"role": "user", "content": checked_text(text, config.prompt_key)}]
    key = config.messages_key
    messages = lookup(row, key)
    if messages is None:
        keys = shown(", ".join(map(str, row))) if row else "none"
        raise RowError(
            Reason.NO_PROMPT,
            f"neither {config.prompt_key!r} nor {key!r} is there; set data.prompt_key or data.messages_key "
            f"to one of the row's keys ({keys})",
        )
    return checked_chat(messages, key)


def _label(
    row: Mapping[str, Any], source: SourceConfig, config: DataConfig, labels: Collection[str]
) -> tuple[str, tuple[tuple[str, float], ...]]:
    """The row's label and, if it names several, their shares."""
    label = source.label if source.label is not None else lookup(row, config.label_key)
    known = ", ".join(sorted(labels))
    if label is None:
        raise DataError(
            f"no label: {config.label_key!r} is missing; add it, set data.label_key, or set the source's label "
            f"(labels with a teacher: {known})"
        )
    if isinstance(label, Mapping):
        return _mixture(label, config.label_key, labels, known)
    if not isinstance(label, str):
        raise _NoTeacher(label, known, f"{config.label_key!r} is {shown(label)}, not a label;")
    if label not in labels:
        raise _NoTeacher(label, known)
    return label, ()


def _mixture(
    weights: Mapping[Any, Any], key: str, labels: Collection[str], known: str
) -> tuple[str, tuple[tuple[str, float], ...]]:
    """Labels with weights, scaled to sum to 1; a label of weight 0 is left out."""
    for label in weights:
        if label not in labels:
            raise _NoTeacher(label, known)
    check_weights(weights, key)
    total = sum(weights.values())
    shares = tuple((label, weight / total) for label, weight in sorted(weights.items()) if weight)
    return ("+".join(label for label, _ in shares), shares if len(shares) > 1 else ())


def read_prompts(
    config: DataConfig,
    sources: Sequence[SourceConfig],
    tokenizer: Tokenizer,
    labels: Collection[str],
    *,
    options: Mapping[str, Any] | None = None,
    views: Mapping[str, Encoder] | None = None,
    each_row: Callable[[], None] = lambda: None,
) -> tuple[list[Prompt], PromptReport]:
    """Read, label and tokenize prompts.

    Args:
        config: how rows are read.
        sources: the files, in order.
        tokenizer: the student's.
        labels: labels that have a teacher.
        options: of the chat template, in place of the config's.
        views: what makes the token ids of teachers that are given others, by name.
        each_row: called before each row: this may take long.

    Returns:
        The prompts in file order, at least one, and what there is to say about them.

    Raises:
        DataError: a file that cannot be read; rows that are wrong (the first few by file and line, the rest counted),
            among them rows over ``max_prompt_tokens`` when ``too_long`` is ``error``; or no prompt left.
    """
    section = "data" if options is None else "evaluation"
    encoders = {"": Encoder(config, tokenizer, options, key=f"{section}.chat_template_kwargs"), **(views or {})}
    prompts: list[Prompt] = []
    problems: list[tuple[str, DataError]] = []
    too_long = 0
    for source in sources:
        for number, (where, row) in enumerate(read_rows(Path(source.path))):
            if source.limit and number >= source.limit:
                break
            each_row()
            try:
                if isinstance(row, DataError):
                    raise row
                messages = _messages(row, config)
                label, mixture = _label(row, source, config, labels)
                ids = {name: encode(messages) for name, encode in encoders.items()}
            except DataError as error:
                problems.append((where, error))
                continue
            given = {name: tuple(token_ids) for name, token_ids in ids.items() if token_ids is not None}
            if len(given) < len(ids):
                too_long += 1
                continue
            own, text = given.pop(""), messages[-1]["content"]
            prompts.append(Prompt(len(prompts), label, own, text, mixture, tuple(given.items())))
    if problems:
        raise DataError(_summary(problems, config.label_key))
    if not prompts:
        files = ", ".join(source.path for source in sources)
        why = f"all {too_long} are longer than data.max_prompt_tokens={config.max_prompt_tokens}; raise it"
        raise DataError(f"no prompt in {files}: {why if too_long else 'there is no row; name files that hold prompts'}")
    return prompts, _report(prompts, too_long)


def _summary(problems: Sequence[tuple[str, DataError]], label_key: str) -> str:
    lines = [f"{where}: {error}" for where, error in problems[:_EXAMPLES]]
    unknown = [error.label for _, error in problems if isinstance(error, _NoTeacher)]
    if look_like_answers(unknown):
        lines.append(
            f"what is under {label_key!r} looks like answers, not labels; name the key of the labels with "
            "data.label_key, or give each file a label (data.train.0.label)"
        )
    if len(problems) > _EXAMPLES:
        lines.append(f"... and {len(problems) - _EXAMPLES} more wrong rows")
        counts = Counter(map(str, unknown)).most_common(10)
        if counts:
            lines.append("rows by label without a teacher: " + ", ".join(f"{label} {n}" for label, n in counts))
    return "\n".join(lines)


def _report(prompts: Sequence[Prompt], too_long: int) -> PromptReport:
    lengths = sorted(len(p.token_ids) for p in prompts)
    percentiles = {p: lengths[min(len(lengths) - 1, p * len(lengths) // 100)] for p in (50, 90, 100)}
    repeated = len(prompts) - len({p.token_ids for p in prompts})
    return PromptReport(dict(Counter(p.label for p in prompts)), too_long, repeated, percentiles)


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Changes when any prompt, label or their order does: a resumed run must see the same prompts."""
    digest = hashlib.sha256()
    for prompt in prompts:
        label = prompt.label + "".join(f":{share!r}" for _, share in prompt.mixture)
        ids = (prompt.token_ids, *(ids for _, ids in prompt.views))
        digest.update(f"{label}\t{';'.join(','.join(map(str, view)) for view in ids)}\n".encode())
    return digest.hexdigest()
