"""``fire-megatron COMMAND``: every command under one name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fire_megatron.cli import evaluate, plan, recipe, report, train

_COMMANDS = {
    "train": (train.main, "run a recipe (under torchrun or srun)"),
    "recipe": (recipe.main, "print a recipe with its defaults and overrides"),
    "evaluate": (evaluate.main, "score a model on benchmarks (under torchrun or srun, or alone)"),
    "plan": (plan.main, "say what a recipe needs on so many GPUs, without any"),
    "report": (report.main, "write a run's curves and trajectories as an HTML page"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Hand over to a command; its exit code."""
    listed = "\n".join(f"  {name:<8} {text}" for name, (_, text) in _COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="fire-megatron",
        description="Multi-teacher on-policy distillation at Megatron scale.",
        epilog=f"commands:\n{listed}\n\nfire-megatron COMMAND --help says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=_COMMANDS, metavar="COMMAND", help="what to do")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the command's own")
    args = parser.parse_args(argv)
    return _COMMANDS[args.command][0](args.arguments)
