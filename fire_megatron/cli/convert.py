"""``fire-megatron convert``: between Hugging Face folders and megatron checkpoints."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from fire_megatron.checkpoint.folder import check_conversion, check_export
from fire_megatron.cli.command import telling_mistakes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fire-megatron convert", description="Convert between Hugging Face folders and megatron checkpoints."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    there = commands.add_parser("hf-to-megatron", help="make a checkpoint that loads at any TP x PP")
    there.add_argument("--hf", required=True, type=Path, help="Hugging Face folder (safetensors)")
    back = commands.add_parser("megatron-to-hf", help="export a checkpoint, or a step of a run")
    back.add_argument("--checkpoint", required=True, type=Path, help="converted checkpoint or RUN/checkpoints/step_*")
    back.add_argument("--shard-gb", type=float, default=5.0, help="largest safetensors file (default 5)")
    for command in (there, back):
        command.add_argument("--out", required=True, type=Path, help="folder to make")
        command.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: each tensor's in the source")
        command.add_argument("--overwrite", action="store_true", help="replace a folder of the same kind")
    return parser


@telling_mistakes
def main(argv: Sequence[str] | None = None) -> int:
    """Convert. Exit codes: 0 done, 2 a mistake in the input."""
    args = _parser().parse_args(argv)
    # torch takes seconds to import; mistakes that config.json tells should not.
    if args.command == "hf-to-megatron":
        check_conversion(args.hf, args.out, overwrite=args.overwrite)
    else:
        check_export(args.checkpoint, args.out, overwrite=args.overwrite)
    from fire_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf

    common = {"dtype": args.dtype, "overwrite": args.overwrite, "progress": True}
    started = time.perf_counter()
    if args.command == "hf-to-megatron":
        out = hf_to_megatron(args.hf, args.out, **common)
    else:
        out = megatron_to_hf(args.checkpoint, args.out, shard_gb=args.shard_gb, **common)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"wrote {out} ({size / 1e6:.0f} MB, {time.perf_counter() - started:.1f} s)")
    return 0
