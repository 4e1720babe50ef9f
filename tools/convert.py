#!/usr/bin/env python3
"""Convert between Hugging Face folders and megatron checkpoints.

python tools/convert.py hf-to-megatron --hf DIR --out DIR [--dtype bfloat16]
python tools/convert.py megatron-to-hf --checkpoint DIR --out DIR
"""

import argparse
import sys
import time
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    there = commands.add_parser("hf-to-megatron", help="make a checkpoint that loads at any TP x PP")
    there.add_argument("--hf", required=True, type=Path, help="Hugging Face folder (safetensors)")
    back = commands.add_parser("megatron-to-hf", help="export a checkpoint, or a step of a run")
    back.add_argument("--checkpoint", required=True, type=Path, help="converted checkpoint or RUN/checkpoints/step_*")
    back.add_argument("--shard-gb", type=float, default=5.0, help="largest safetensors file (default 5)")
    for command in (there, back):
        command.add_argument("--out", required=True, type=Path, help="folder to make")
        command.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as stored")
        command.add_argument("--overwrite", action="store_true", help="replace a folder of the same kind")
    return parser


def main() -> int:
    """Exit codes: 0 done, 2 a mistake in the input."""
    args = _parser().parse_args()
    from fire_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf
    from fire_megatron.config.errors import UserError

    common = {"dtype": args.dtype, "overwrite": args.overwrite, "progress": True}
    started = time.perf_counter()
    try:
        if args.command == "hf-to-megatron":
            out = hf_to_megatron(args.hf, args.out, **common)
        else:
            out = megatron_to_hf(args.checkpoint, args.out, shard_gb=args.shard_gb, **common)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"wrote {out} ({size / 1e6:.0f} MB, {time.perf_counter() - started:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
