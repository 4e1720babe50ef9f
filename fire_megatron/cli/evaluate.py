"""The evaluation command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fire_megatron.cli.guard import guarded, run_command
from fire_megatron.config.errors import Problem, RecipeError

if TYPE_CHECKING:
    from fire_megatron.evaluation.standalone import Options, Work
    from fire_megatron.platform.device import Device
    from fire_megatron.platform.launch import World
    from fire_megatron.platform.watch import Watch


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fire_megatron.evaluate",
        description="Sample answers to benchmarks and judge them: avg@k, pass@k and maj@k. Under torchrun the answers "
        "are shared among the ranks. The same command continues what was stopped.",
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", metavar="DIR", help="converted checkpoint, or a step of a run")
    model.add_argument("--hf", metavar="DIR", help="Hugging Face folder; converted for the time of loading")
    parser.add_argument(
        "--benchmark", nargs="+", action="extend", required=True, metavar="FILE", help="JSON Lines: problem, answer"
    )
    parser.add_argument("--samples", type=int, default=1, metavar="K", help="answers to each problem (1)")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="problems of each file, from its start (all)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (1.0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this mass (1.0)")
    parser.add_argument("--max-new-tokens", type=int, default=4096, metavar="N", help="longest answer (4096)")
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="answers that a replica samples at once"
    )
    parser.add_argument(
        "--stop-token", action="append", default=[], metavar="TOKEN",
        help="ends an answer besides the tokenizer's own; as in rollout.stop_tokens of the recipe; may be repeated",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=7, help="seeds the sampling (7)")
    parser.add_argument("--system-prompt", metavar="TEXT", help="system message before every problem")
    parser.add_argument(
        "--chat-template", choices=("auto", "on", "off"), default="auto", help="auto uses the tokenizer's if it has one"
    )
    parser.add_argument("--tensor", type=int, default=1, metavar="N", help="tensor-parallel ranks of a replica (1)")
    parser.add_argument("--pipeline", type=int, default=1, metavar="N", help="pipeline stages of a replica (1)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes CUDA if there")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on GPUs, else float32"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="results (evaluation/NAME beside the model)")
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="a rank may be waited for so long (600)"
    )
    return parser


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "samples": (lambda value: 1 <= value < 2**16, "give 1 to 65535"),
    "limit": (lambda value: value >= 0, "give 0 (all) or more"),
    "temperature": (lambda value: 0 <= value < float("inf"), "give 0 or more"),
    "top_p": (lambda value: 0 < value <= 1, "give more than 0 and at most 1"),
    "max_new_tokens": (lambda value: value >= 1, "give at least 1"),
    "batch_size": (lambda value: value >= 1, "give at least 1"),
    "seed": (lambda value: 0 <= value < 2**63, "give 0 or more"),
    "tensor": (lambda value: value >= 1, "give at least 1"),
    "pipeline": (lambda value: value >= 1, "give at least 1"),
    "timeout": (lambda value: 0 < value < float("inf"), "give seconds above 0"),
}


def _check(args: argparse.Namespace) -> None:
    """Raises RecipeError: an option out of its range."""
    for name, (fits, advice) in _RANGES.items():
        value = getattr(args, name)
        if not fits(value):
            raise RecipeError(f"--{name.replace('_', '-')} {value}: {advice}")
    if args.temperature == 0 and args.samples > 1:
        raise RecipeError(
            f"--samples {args.samples} with --temperature 0 is one answer {args.samples} times; leave it out, or raise "
            "the temperature"
        )


_OPTIONS = {"parallel": "--tensor, --pipeline", "checkpoint": "--checkpoint or --hf"}


def _option(key: str) -> str:
    """The option of a key that the recipe of a run has it by."""
    return _OPTIONS.get(key, "--" + key.rpartition(".")[2].replace("_", "-"))


def _refuse(problems: Iterable[Problem]) -> None:
    """Raises RecipeError: all of them, if there are any."""
    text = "\n".join(map(str, problems))
    if text:
        raise RecipeError(text)


def _read(args: argparse.Namespace, device: Device) -> tuple[Work, Options]:
    """Everything but the weights.

    Raises:
        UserError: what is wrong.
    """
    from fire_megatron.config.checks import role_problems
    from fire_megatron.config.rules.data import benchmark_name, benchmark_names, file_problem, template
    from fire_megatron.config.rules.facts import Role
    from fire_megatron.config.schema import DataConfig, ParallelConfig, PrecisionConfig, RoleConfig, SourceConfig
    from fire_megatron.data.encoder import Encoder
    from fire_megatron.data.tokenizer import load_tokenizer, stop_ids
    from fire_megatron.evaluation.benchmarks import encode_problems, read_benchmark
    from fire_megatron.evaluation.source import open_source
    from fire_megatron.evaluation.standalone import Options, Work
    from fire_megatron.models.build import this_machine
    from fire_megatron.platform import launch

    _refuse(Problem(f"--benchmark {path}", text) for path in args.benchmark if (text := file_problem(Path(path))))
    _refuse(benchmark_names((f"--benchmark {path}", benchmark_name(path)) for path in args.benchmark))
    benchmarks = [read_benchmark(path, limit=args.limit) for path in args.benchmark]
    source = open_source(args.hf or args.checkpoint, is_hf=args.hf is not None)
    tokenizer = load_tokenizer(source.folder)
    data = DataConfig(
        train=tuple(SourceConfig(path=path) for path in args.benchmark),
        chat_template=args.chat_template,
        system_prompt=args.system_prompt,
        max_prompt_tokens=sys.maxsize,
        too_long="error",
    )
    dtype = PrecisionConfig(None if args.dtype == "auto" else args.dtype).on(device.kind).dtype
    role = RoleConfig(
        str(source.folder),
        parallel=ParallelConfig(args.tensor, args.pipeline),
        precision=PrecisionConfig(dtype),
    )
    ranks = launch.launched_world_size()
    model = Role(
        _option,
        role,
        trains=False,
        shape=source.shape,
        ranks=ranks,
        kind=device.kind,
        machine=this_machine(device),
        tokenizer=tokenizer,
    )
    _refuse([*role_problems(model), *template(data, tokenizer, _option)])
    encode, room = Encoder(data, tokenizer), source.shape.max_positions - args.max_new_tokens
    prompts = [encode_problems(benchmark, encode, room=room) for benchmark in benchmarks]
    fixed = ("temperature", "top_p", "max_new_tokens", "seed", "system_prompt", "chat_template", "stop_token")
    settings = {name: getattr(args, name) for name in fixed} | {"dtype": dtype}
    folder = source.folder.absolute()
    options = Options(
        samples=args.samples,
        temperature=args.temperature,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        seed=args.seed,
        dtype=dtype,
        tensor=args.tensor,
        pipeline=args.pipeline,
        out=args.out or folder.parent / "evaluation" / folder.name,
        timeout=args.timeout,
    )
    ends = stop_ids(tokenizer, args.stop_token, "--stop-token")
    return Work(source, tokenizer, ends, benchmarks, prompts, settings), options


def _evaluate(args: argparse.Namespace, world: World, watch: Watch) -> None:
    """Read, sample, score. Raises UserError on every rank, if any finds something wrong."""
    from fire_megatron.evaluation.standalone import Evaluation
    from fire_megatron.parallel.collectives import everywhere
    from fire_megatron.train.interrupt import StopRequest

    stop = StopRequest().install()
    work, options = everywhere(_read, args, world.device)
    Evaluation(work, options, world, watch, lambda: stop.signal_name).run()
    stop.restore()


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate.

    Exit codes: 0 done or stopped on request with everything saved, 2 a mistake in the input, 3 another rank has died or
    failed, 130 interrupted twice.
    """
    args = _parser().parse_args(argv)
    # torch takes seconds to import; mistakes in options should not.
    from fire_megatron.platform import launch

    def work(_: None) -> None:
        world = launch.start(args.device, timeout=args.timeout)
        guarded(world, lambda watch: _evaluate(args, world, watch), held="the model", timeout=args.timeout)

    return run_command(lambda: _check(args), work)
