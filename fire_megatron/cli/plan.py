"""The planning command."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fire_megatron.config.errors import UserError
from fire_megatron.config.load import load_recipe

if TYPE_CHECKING:
    from fire_megatron.plan.advice import Advice
    from fire_megatron.plan.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("recipe", help="YAML recipe, see recipes/ and docs/recipe.md")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    parser.add_argument("--world-size", type=int, required=True, help="ranks of the run")
    parser.add_argument("--gpu", help="a100-40, a100-80, h100, h200 or b200: say what fits, and estimate times")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="ranks of a node (8)")
    parser.add_argument("--prompt-tokens", type=int, help="length of every prompt (data.max_prompt_tokens)")
    parser.add_argument("--response-tokens", type=int, help="length of every answer (rollout.max_new_tokens)")
    parser.add_argument(
        "--models",
        type=Path,
        help="folder of NAME/config.json, for checkpoints .../NAME of the recipe that are not on this machine",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _make(args: argparse.Namespace) -> tuple[Plan, list[Advice]]:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns of groups without a backend, which these have not
    from fire_megatron.platform.apex import refuse_other_apex

    refuse_other_apex()
    warnings.filterwarnings("ignore")
    from tqdm import tqdm

    from fire_megatron.plan.advice import advise
    from fire_megatron.plan.gpus import GPUS
    from fire_megatron.plan.plan import make_plan, prepare

    if args.gpu is not None and args.gpu not in GPUS:
        raise UserError(f"--gpu {args.gpu}: not known; use one of {', '.join(GPUS)}")
    for name in ("world_size", "gpus_per_node"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: give at least 1")
    recipe = load_recipe(args.recipe, args.overrides)
    job = prepare(
        recipe,
        world_size=args.world_size,
        gpu=GPUS.get(args.gpu),
        gpus_per_node=args.gpus_per_node,
        models=args.models,
        prompt_tokens=args.prompt_tokens,
        response_tokens=args.response_tokens,
    )
    with tqdm(bar_format="{desc} [{elapsed}]", disable=not sys.stderr.isatty(), leave=False) as bar:
        plan = make_plan(job, say=bar.set_description_str)
        return plan, advise(plan, say=bar.set_description_str)


def run(args: argparse.Namespace) -> int:
    """Plan a run. Exit codes: 0 it fits (or no GPU was named), 4 it does not, 2 a mistake in the input."""
    try:
        plan, advice = _make(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from fire_megatron.plan.plan import as_json
    from fire_megatron.plan.text import describe

    print(as_json(plan, [a.as_dict() for a in advice]) if args.json else describe(plan, advice))
    return 0 if all(kind.fits for kind in plan.kinds) else 4


def main(argv: Sequence[str] | None = None) -> int:
    """``fire-megatron plan`` on its own."""
    parser = argparse.ArgumentParser(prog="fire-megatron plan", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_intermixed_args(argv))
