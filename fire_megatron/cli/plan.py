"""``fire-megatron plan``: what a run needs."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from fire_megatron.cli.command import add_recipe, check_least, telling_mistakes
from fire_megatron.config.checks import check_recipe, found_elsewhere
from fire_megatron.config.errors import UserError
from fire_megatron.config.load import load_recipe
from fire_megatron.plan.hardware import GPUS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fire-megatron plan", description="Say what a recipe needs on so many GPUs, without any."
    )
    add_recipe(parser)
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
    return parser


@telling_mistakes
def main(argv: Sequence[str] | None = None) -> int:
    """Plan a run. Exit codes: 0 it fits (or no GPU was named), 4 it does not, 2 a mistake in the input."""
    args = _parser().parse_intermixed_args(argv)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns of groups without a backend, which these have not
    from fire_megatron.platform.apex import refuse_other_apex

    refuse_other_apex()
    warnings.filterwarnings("ignore")
    if args.gpu is not None and args.gpu not in GPUS:
        raise UserError(f"--gpu {args.gpu}: not known; use one of {', '.join(GPUS)}")
    check_least(args, 1, "world_size", "gpus_per_node")
    recipe = load_recipe(args.recipe, args.overrides)
    # torch takes seconds to import; mistakes that the recipe and config.json tell should not.
    check_recipe(recipe, world_size=args.world_size, elsewhere=found_elsewhere(recipe, args.models))
    from tqdm import tqdm

    from fire_megatron.plan.advice import advise
    from fire_megatron.plan.plan import as_json, make_job, make_plan
    from fire_megatron.plan.text import describe

    job = make_job(
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
        advice = advise(plan, say=bar.set_description_str)
    print(as_json(plan, advice) if args.json else describe(plan, advice))
    return 0 if all(kind.fits for kind in plan.kinds) else 4
