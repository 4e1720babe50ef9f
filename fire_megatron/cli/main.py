"""``fire-megatron COMMAND``: every command under one name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fire_megatron import __version__
from fire_megatron.cli import convert, evaluate, plan, prepare, recipe, report, train

COMMANDS = {
    "convert": (convert.main, "make a checkpoint from a Hugging Face folder, or export one"),
    "prepare": (prepare.main, "make a file of prompts from data sets"),
    "recipe": (recipe.main, "print a recipe with its defaults and overrides"),
    "plan": (plan.main, "say what a recipe needs on so many GPUs, without any"),
    "train": (train.main, "run a recipe (under torchrun or srun)"),
    "evaluate": (evaluate.main, "score a model on benchmarks (under torchrun or srun, or alone)"),
    "report": (report.main, "write a run's curves and trajectories as an HTML page"),
}
"""By name, in the order of their use."""


def main(argv: Sequence[str] | None = None) -> int:
    """Hand over to a command; its exit code."""
    listed = "\n".join(f"  {name:<8} {text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="fire-megatron",
        description="Multi-teacher on-policy distillation at Megatron scale.",
        epilog=f"commands:\n{listed}\n\nfire-megatron COMMAND --help says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="what to do")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, default=[], help="the command's own")
    parser.add_argument("--version", action="version", version=__version__)
    args = parser.parse_args(argv)
    return COMMANDS[args.command][0](args.arguments)
