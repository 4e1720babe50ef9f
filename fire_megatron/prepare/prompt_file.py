"""Rows of data sets into prompts that training reads as they are: labelled, without duplicates and benchmarks.

Memory does not grow with texts: a row kept leaves a hash, its place and its length. See docs/data.md.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from fire_megatron.config.data import DataConfig, SourceConfig
from fire_megatron.config.errors import DataError
from fire_megatron.config.kinds import MOST
from fire_megatron.data.encoder import Encoder, surely_longer
from fire_megatron.data.rows import Reason, RowError, check_weights, present, row_messages, shown
from fire_megatron.data.tokenizer import load_tokenizer
from fire_megatron.metrics.progress import Progress, progress_bar
from fire_megatron.platform.files import NewFiles
from fire_megatron.prepare.contamination import OVERLAP, BenchmarkProblems
from fire_megatron.prepare.row_keys import KeyChoice, RowKeys, open_rows
from fire_megatron.prepare.same_text import plain
from fire_megatron.prepare.tally import PrepareReport, SourceReport, Tally


@dataclass(frozen=True, kw_only=True)
class PromptFileOptions:
    """What to prepare, and how."""

    inputs: Sequence[str]
    """Files of rows or glob patterns: ``.jsonl``, ``.json``, either with ``.gz``, or ``.parquet``."""
    out: Path
    """JSON Lines to write."""
    keys: KeyChoice = field(default_factory=KeyChoice)
    """Keys of the rows; those not named are found for each file."""
    label: str | None = None
    """Label of every row; None reads it from the rows."""
    label_map: Mapping[str, str] = field(default_factory=dict)
    """New names of labels, applied before ``labels``."""
    labels: frozenset[str] | None = None
    """Labels that are kept; None keeps all."""
    tokenizer: Path | None = None
    """Folder of the student's tokenizer, to count lengths in tokens; None counts characters."""
    max_prompt_tokens: int | None = None
    """Longest prompt kept, in tokens with the chat template."""
    benchmarks: Sequence[str] = ()
    """Files or patterns of problems that must not be trained on."""
    benchmark_key: str | None = None
    """Key of a benchmark's problem; None finds it."""
    overlap: float = OVERLAP
    """Share of a problem's words, in shared runs, from which on a row is refused."""
    rejects: Path | None = None
    """JSON Lines of the rejected rows, to write."""
    report: Path | None = None
    """JSON of the report, to write."""
    overwrite: bool = False
    """Whether files that are there may be replaced."""

    def __post_init__(self) -> None:
        if self.out.suffix != ".jsonl":
            raise DataError(f"--out {self.out}: a recipe reads JSON Lines by that name; let it end in .jsonl")
        if self.max_prompt_tokens is not None and self.tokenizer is None:
            raise DataError("--max-prompt-tokens needs --tokenizer DIR, the folder of the student's tokenizer")
        if not 0 < self.overlap <= 1:
            raise DataError(f"--overlap {self.overlap}: give a share above 0 and at most 1")
        if self.label is not None and (self.label_map or self.keys.label):
            raise DataError("--label gives every row one label; leave out --label-key and --map")
        if self.labels is not None and self.label is not None and self.label not in self.labels:
            raise DataError(f"--label {self.label} is not among --labels {','.join(sorted(self.labels))}")


class NoRowsLeft(DataError):
    """Every row was rejected."""

    def __init__(self, report: PrepareReport) -> None:
        """Args: report: why."""
        files = report.sources[0].path if len(report.sources) == 1 else f"{len(report.sources)} files"
        why = f"all {report.rows} are rejected, see the report" if report.rows else "there is none"
        super().__init__(f"no row left of {files}: {why}; {report.out} is not written")
        self.report = report


def make_prompt_file(options: PromptFileOptions, *, progress: bool = False) -> PrepareReport:
    """Write the prompts.

    Args:
        options: see there.
        progress: show a bar on standard error.

    Raises:
        DataError: what the user can put right: inputs, keys, benchmarks, outputs; nothing is written then.
        NoRowsLeft: every row was rejected; rejects and report are written.
    """
    inputs, benchmark_files = _files(options.inputs), _files(options.benchmarks)
    with NewFiles(overwrite=options.overwrite) as files:
        _check_outputs(options, files, [*inputs, *benchmark_files])
        choice = replace(options.keys, wants_label=options.label is None)
        keys = [choice.of(path) for path in inputs]
        benchmarks = BenchmarkProblems(benchmark_files, key=options.benchmark_key, overlap=options.overlap)
        preparation = _Preparation(options, benchmarks)
        out = files.open(options.out)
        rejects, report_file = (files.open(path) if path else None for path in (options.rejects, options.report))
        with progress_bar(unit=" rows", show=progress) as bar:
            for path, file_keys in zip(inputs, keys, strict=True):
                bar.set_postfix_str(path.name)
                preparation.read(path, file_keys, out, rejects, bar)
        unit = "characters" if options.tokenizer is None else "tokens"
        report = preparation.tally.report(str(options.out), unit, benchmarks)
        if report_file:
            json.dump(report.as_json(), report_file, indent=1)
        for path in (options.rejects, options.report):
            if path:
                files.publish(path)
        if not report.kept:
            raise NoRowsLeft(report)
        files.publish(options.out)
    return report


def _files(patterns: Sequence[str]) -> list[Path]:
    """The files that patterns name, each once, in order. Raises DataError for one that names none."""
    found: dict[Path, Path] = {}
    for pattern in patterns:
        names = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not names:
            raise DataError(f"{pattern}: no such file; correct the path, or the pattern")
        for path in map(Path, names):
            if path.is_dir():
                raise DataError(f"{path}: is a folder; name the files, such as '{path}/*.parquet'")
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _check_outputs(options: PromptFileOptions, files: NewFiles, read: Sequence[Path]) -> None:
    written: list[Path] = []
    for path in (options.out, options.rejects, options.report):
        if path is not None:
            if path.resolve() in written:
                raise DataError(f"{path}: is named for two outputs; give each a file of its own")
            files.check(path, read)
            written.append(path.resolve())


class _Preparation:
    """What rows are looked at with, and what has been seen of them."""

    def __init__(self, options: PromptFileOptions, benchmarks: BenchmarkProblems) -> None:
        self.options = options
        self.benchmarks = benchmarks
        self.tally = Tally()
        self.encode: Encoder | None = None
        if options.tokenizer is not None:
            unlimited = DataConfig(train=(SourceConfig(path="-"),), max_prompt_tokens=MOST)
            self.encode = Encoder(unlimited, load_tokenizer(options.tokenizer))
        self._seen = _Seen()

    def read(self, path: Path, keys: RowKeys, out: IO[str], rejects: IO[str] | None, bar: Progress) -> None:
        """Take or reject every row of a file."""
        constant = {} if self.options.label is None else {"label": f"{self.options.label} (all rows)"}
        source = SourceReport(str(path), keys.named | constant)
        self.tally.sources.append(source)
        for where, row in open_rows(path, keys.all):
            bar.update()
            source.rows += 1
            try:
                out.write(self._line(where, row, keys))
            except RowError as error:
                self.tally.reject(error.reason, where, str(error))
                if rejects:
                    entry = {"reason": error.reason, "where": where, "detail": str(error)}
                    entry |= {"row": row} if isinstance(row, dict) else {}
                    rejects.write(json.dumps(entry, default=str) + "\n")

    def _line(self, where: str, row: dict[str, Any] | DataError, keys: RowKeys) -> str:
        """The row as training reads it. Raises RowError for one that is not kept."""
        if isinstance(row, DataError):
            raise RowError(Reason.INVALID_JSON, str(row))
        messages = row_messages(row, keys.prompt)
        label, name, mark = self._label(row, keys)
        only = messages[0] if len(messages) == 1 and messages[0]["role"] == "user" else None
        prompt = {"problem": only["content"]} if only else {"messages": messages}
        answer = present(row, keys.answer) if keys.answer else None
        line = prompt | {"label": label} | ({} if answer is None else {"answer": answer}) | {"id": where}
        text = _as_json(line)
        digest, plain_texts = _same_chat(messages)
        self._refuse_duplicate(digest, mark)
        match = self.benchmarks.find(plain_texts)
        if match:
            self.tally.contaminated(match)
            raise RowError(Reason.CONTAMINATED, str(match))
        self.tally.keep(name, self._length(messages))
        self._seen.add(digest, where, mark)
        return text

    def _label(self, row: Mapping[str, Any], keys: RowKeys) -> tuple[str | dict[str, float], str, str]:
        """The label as it is written, as it is counted, and as it is compared."""
        if self.options.label is not None:
            return (self.options.label,) * 3
        value = present(row, keys.label) if keys.label else None
        if isinstance(value, Mapping):
            value = {label: weight for label, weight in value.items() if weight is not None}  # Parquet has every field
        if value is None or value == "" or value == {}:
            raise RowError(Reason.NO_LABEL, f"nothing under {keys.label!r}" if keys.label else "no key of a label")
        if isinstance(value, str):
            label = self._known(value)
            return label, label, label
        if not isinstance(value, Mapping):
            raise RowError(Reason.UNKNOWN_LABEL, f"{keys.label!r} is {shown(value)}, not a label")
        check_weights(value, str(keys.label))
        weights: dict[str, float] = {}
        for label, weight in value.items():
            known = self._known(label)
            weights[known] = weights.get(known, 0) + weight
        names = sorted(label for label, weight in weights.items() if weight)
        if len(names) == 1:
            return names[0], names[0], names[0]
        total = sum(weights.values())
        return weights, "+".join(names), "+".join(f"{weights[label] / total:.6g} {label}" for label in names)

    def _known(self, label: str) -> str:
        label = self.options.label_map.get(label, label)
        if self.options.labels is not None and label not in self.options.labels:
            allowed = ", ".join(sorted(self.options.labels))
            raise RowError(Reason.UNKNOWN_LABEL, f"label {shown(label)} is not among {allowed}")
        return label

    def _refuse_duplicate(self, digest: bytes, mark: str) -> None:
        first = self._seen.find(digest)
        if first is None:
            return
        where, other = first
        if other == mark:
            raise RowError(Reason.DUPLICATE, f"the prompt of {where}")
        self.tally.other_label(other, mark)
        raise RowError(Reason.DUPLICATE_OTHER_LABEL, f"the prompt of {where}, label {mark}; kept with label {other}")

    def _length(self, messages: list[dict[str, str]]) -> int:
        characters = sum(len(message["content"]) for message in messages)
        if self.encode is None:
            return characters
        limit = self.options.max_prompt_tokens
        if limit is not None and surely_longer(characters, limit):
            raise RowError(Reason.TOO_LONG, f"{characters} characters, far more than {limit} tokens")
        try:
            token_ids = self.encode(messages)
        except DataError as error:
            raise RowError(Reason.TOKENIZER_REFUSES, str(error)) from error
        length = len(token_ids or ())
        if limit is not None and length > limit:
            raise RowError(Reason.TOO_LONG, f"{length} tokens, more than {limit}")
        return length


def _as_json(line: Mapping[str, Any]) -> str:
    """One line. Raises RowError when label or answer cannot be written as UTF-8."""
    text = json.dumps(line, ensure_ascii=False, default=str) + "\n"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(Reason.HALF_SURROGATE, f"label or answer holds half a surrogate pair ({error})") from error
    return text


def _same_chat(messages: Sequence[Mapping[str, str]]) -> tuple[bytes, list[str]]:
    """A hash that chats share exactly when they are the same but for looks, and their plain texts.

    A message that is an instruction only counts as none: some put it into a system message, some behind the problem.
    """
    texts = [plain(message["content"]) for message in messages]
    digest = hashlib.blake2b(digest_size=12)
    for message, text in zip(messages, texts, strict=True):
        if text:
            digest.update(f"{message['role']}\x1f{text}\x1e".encode())
    return digest.digest(), texts


class _Seen:
    """Where each prompt was first kept, and with which label."""

    def __init__(self) -> None:
        self._index: dict[bytes, int] = {}
        self._heads: dict[str, int] = {}
        self._marks: dict[str, int] = {}
        self._places: tuple[array, array, array] = (array("I"), array("Q"), array("I"))

    def add(self, digest: bytes, where: str, mark: str) -> None:
        """A prompt that is kept."""
        head, number = re.fullmatch(r"(.*?)(\d+)", where, re.DOTALL).groups()
        values = (self._heads.setdefault(head, len(self._heads)), int(number))
        self._index[digest] = len(self._places[0])
        for places, value in zip(self._places, (*values, self._marks.setdefault(mark, len(self._marks))), strict=True):
            places.append(value)

    def find(self, digest: bytes) -> tuple[str, str] | None:
        """Place and label of the first; None for a prompt not seen."""
        index = self._index.get(digest)
        if index is None:
            return None
        head, number, mark = (places[index] for places in self._places)
        return f"{list(self._heads)[head]}{number}", list(self._marks)[mark]
