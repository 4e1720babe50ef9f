"""``fire-megatron prepare``: a file of prompts from data sets."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fire_megatron.cli.command import telling_mistakes

if TYPE_CHECKING:
    from fire_megatron.prepare.prompt_file import PromptFileOptions


def _renamed(text: str) -> tuple[str, str]:
    old, sign, new = text.partition("=")
    if not (old and sign and new):
        raise argparse.ArgumentTypeError(f"{text!r}: write old=new")
    return old, new


def _names(text: str) -> frozenset[str]:
    names = frozenset(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError("write labels, separated by commas")
    return names


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: write a number of at least 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fire-megatron prepare",
        description="Make a file of prompts from data sets: labelled, without duplicates, without the problems of "
        "benchmarks.",
    )
    parser.add_argument("inputs", nargs="+", metavar="FILE", help=".jsonl, .json, .csv, .tsv, .parquet; or a pattern")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="prompts to write, .jsonl")
    keys = parser.add_argument_group("keys of a row (dotted paths; found for each file when not given)")
    keys.add_argument("--prompt-key", metavar="KEY", help="the prompt: a text, or chat messages")
    keys.add_argument("--messages-key", metavar="KEY", help="chat messages, for rows without the prompt key")
    keys.add_argument("--label-key", metavar="KEY", help="the teacher's label, or labels with weights")
    keys.add_argument("--answer-key", metavar="KEY", help="the right answer")
    labels = parser.add_argument_group("labels")
    labels.add_argument("--label", help="of every row, whatever the rows say")
    labels.add_argument("--map", action="append", default=[], type=_renamed, metavar="OLD=NEW", help="rename a label")
    labels.add_argument("--labels", type=_names, metavar="A,B", help="reject rows with any other label")
    lengths = parser.add_argument_group("lengths")
    lengths.add_argument("--tokenizer", type=Path, metavar="DIR", help="count tokens, not characters")
    lengths.add_argument("--max-prompt-tokens", type=_count, metavar="N", help="reject longer prompts")
    held_out = parser.add_argument_group("benchmarks")
    held_out.add_argument(
        "--benchmark", nargs="+", action="extend", default=[], metavar="FILE", help="refuse its problems"
    )
    held_out.add_argument("--benchmark-key", metavar="KEY", help="key of its problems")
    held_out.add_argument(
        "--overlap", type=float, default=argparse.SUPPRESS, metavar="SHARE",
        help="of a problem's words that refuses a row",
    )  # fmt: skip
    outputs = parser.add_argument_group("other outputs")
    outputs.add_argument("--rejects", type=Path, metavar="FILE", help="rejected rows with their reasons, .jsonl")
    outputs.add_argument("--report", type=Path, metavar="FILE", help="the report as JSON")
    outputs.add_argument("--overwrite", action="store_true", help="replace files that are there")
    return parser


def _options(args: argparse.Namespace) -> PromptFileOptions:
    from fire_megatron.prepare.prompt_file import PromptFileOptions
    from fire_megatron.prepare.row_keys import KeyChoice

    values = vars(args)
    keys = KeyChoice(*(values.pop(f"{name}_key") for name in ("prompt", "messages", "label", "answer")))
    benchmarks, label_map = values.pop("benchmark"), dict(values.pop("map"))
    return PromptFileOptions(keys=keys, label_map=label_map, benchmarks=benchmarks, **values)


@telling_mistakes
def main(argv: Sequence[str] | None = None) -> int:
    """Make it. Exit codes: 0 done, rejects or not; 2 a mistake in the input, or no row left; 130 interrupted."""
    args = _parser().parse_args(argv)
    from fire_megatron.prepare.prompt_file import NoRowsLeft, make_prompt_file

    started = time.perf_counter()
    try:
        report = make_prompt_file(_options(args), progress=True)
    except NoRowsLeft as error:
        print(error.report)
        raise
    print(f"{report}\n\nwrote {args.out} ({time.perf_counter() - started:.1f} s)")
    return 0
