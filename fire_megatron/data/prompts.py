"""Reading prompt files. Every row is checked; what is wrong is named by file and line."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fire_megatron.config.errors import DataError
from fire_megatron.config.schema import DataConfig, SourceConfig
from fire_megatron.data.records import Prompt

_SHOWN = 5
"""Problems named one by one before the rest is counted."""


@dataclass(frozen=True)
class PromptReport:
    """What was read."""

    by_label: dict[str, int]
    """Prompts kept, by label."""
    too_long: int
    """Prompts dropped for their length."""
    token_percentiles: dict[int, int]
    """Prompt length in tokens at the 50th, 90th and 100th percentile."""

    def __str__(self) -> str:
        labels = ", ".join(f"{label} {count}" for label, count in sorted(self.by_label.items()))
        lengths = ", ".join(f"p{p} {n}" for p, n in self.token_percentiles.items())
        dropped = f"; {self.too_long} too long and dropped" if self.too_long else ""
        return f"{sum(self.by_label.values())} prompts ({labels}); tokens {lengths}{dropped}"


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(file:line, parsed row); a row that is not JSON comes as the error itself."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            if path.suffix == ".json":
                rows = json.load(file)
                if not isinstance(rows, list):
                    raise DataError(f"{path}: a .json file of prompts is a list of objects; for one object a line use .jsonl")
                yield from ((f"{path}: entry {i}", row) for i, row in enumerate(rows))
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield f"{path}:{number}", json.loads(line)
                    except json.JSONDecodeError as error:
                        yield f"{path}:{number}", error
    except FileNotFoundError:
        raise DataError(f"{path}: no such file of prompts") from None
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, json.JSONDecodeError, OSError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 JSON ({error})") from error


def _lookup(row: Mapping[str, Any], dotted: str) -> Any:
    value: Any = row
    for key in dotted.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def _messages(row: Mapping[str, Any], config: DataConfig) -> list[dict[str, str]]:
    """The chat that a row stands for. Raises DataError saying what the row lacks."""
    text = _lookup(row, config.prompt_key)
    if text is not None:
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{config.prompt_key!r} is {text!r}, not a text with something in it")
        return [{"role": "user", "content": text}]
    messages = _lookup(row, config.messages_key)
    if messages is None:
        raise DataError(
            f"neither {config.prompt_key!r} nor {config.messages_key!r} is there; "
            "set data.prompt_key or data.messages_key to one of: " + ", ".join(map(str, row))
        )
    good = isinstance(messages, list) and messages
    if not good or not all(isinstance(m, Mapping) and isinstance(m.get("content"), str) and m.get("role") for m in messages):
        raise DataError(f"{config.messages_key!r} is not a list of {{role, content}} messages")
    return [{"role": str(m["role"]), "content": m["content"]} for m in messages]


def _label(row: Mapping[str, Any], source: SourceConfig, config: DataConfig, labels: Collection[str]) -> str:
    label = source.label if source.label is not None else _lookup(row, config.label_key)
    known = ", ".join(sorted(labels))
    if label is None:
        raise DataError(f"no label: {config.label_key!r} is missing; add it, or set the source's label (known: {known})")
    if label not in labels:
        raise DataError(f"label {label!r} has no teacher; add it to a teacher's labels, or use one of: {known}")
    return str(label)


class _Encoder:
    """Turns a chat into token ids, with the template where the recipe wants it."""

    def __init__(self, config: DataConfig, tokenizer: Any) -> None:
        if config.chat_template == "on" and not tokenizer.has_chat_template:
            raise DataError("data.chat_template is 'on' but the student's tokenizer has no chat template; use 'off'")
        self.system = config.system_prompt
        self.use_template = config.chat_template != "off" and tokenizer.has_chat_template
        self.tokenizer = tokenizer
        if self.system and not self.use_template:
            raise DataError("data.system_prompt needs a chat template; remove it, or use a tokenizer that has one")

    def __call__(self, messages: list[dict[str, str]]) -> list[int]:
        if self.use_template:
            if self.system and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": self.system}, *messages]
            return self.tokenizer.apply_chat_template(messages)
        if len(messages) > 1:
            raise DataError("a chat of several messages needs a chat template; set data.chat_template to 'on'")
        return self.tokenizer.encode(messages[0]["content"])


def read_prompts(
    config: DataConfig, sources: Sequence[SourceConfig], tokenizer: Any, labels: Collection[str]
) -> tuple[list[Prompt], PromptReport]:
    """Read, label and tokenize prompts.

    Args:
        config: how rows are read.
        sources: the files.
        tokenizer: the student's.
        labels: labels that have a teacher.

    Raises:
        DataError: a file that cannot be read, or rows that are wrong: the first few by file and line, the rest
            counted; also rows over ``max_prompt_tokens`` when ``too_long`` is ``error``.
    """
    encode = _Encoder(config, tokenizer)
    prompts: list[Prompt] = []
    problems: list[str] = []
    too_long = 0
    for source in sources:
        for number, (where, row) in enumerate(_rows(Path(source.path))):
            if source.limit and number >= source.limit:
                break
            try:
                if not isinstance(row, Mapping):
                    raise DataError(f"not a JSON object ({row})")
                messages = _messages(row, config)
                label = _label(row, source, config, labels)
                token_ids = encode(messages)
                if len(token_ids) > config.max_prompt_tokens:
                    if config.too_long == "error":
                        raise DataError(
                            f"{len(token_ids)} tokens, more than data.max_prompt_tokens={config.max_prompt_tokens}; "
                            "raise it, or set data.too_long to 'drop'"
                        )
                    too_long += 1
                    continue
            except DataError as error:
                problems.append(f"{where}: {error}")
                continue
            prompts.append(Prompt(len(prompts), label, tuple(token_ids), messages[-1]["content"]))
    if problems:
        more = f"\n... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DataError("\n".join(problems[:_SHOWN]) + more)
    return prompts, _report(prompts, too_long)


def _report(prompts: Sequence[Prompt], too_long: int) -> PromptReport:
    lengths = sorted(len(p.token_ids) for p in prompts)
    percentiles = {p: lengths[min(len(lengths) - 1, p * len(lengths) // 100)] for p in (50, 90, 100)} if lengths else {}
    return PromptReport(dict(Counter(p.label for p in prompts)), too_long, percentiles)


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Changes when any prompt, label or their order does: a resumed run must see the same prompts."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.label}\t{','.join(map(str, prompt.token_ids))}\n".encode())
    return digest.hexdigest()
