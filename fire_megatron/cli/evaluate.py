"""The evaluation command."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fire_megatron.checkpoint.folder import read_hf_folder
from fire_megatron.cli.supervision import run_command, supervised
from fire_megatron.config import schema
from fire_megatron.config.checkpoints import require_checkpoint
from fire_megatron.config.checks import role_problems
from fire_megatron.config.data import DataConfig, EvaluationConfig, SourceConfig
from fire_megatron.config.errors import RecipeError, RecipeProblem, RecipeProblems
from fire_megatron.config.hf_config import read_hf_config
from fire_megatron.config.kinds import MOST
from fire_megatron.config.rules.data import benchmark_name, benchmark_names, file_problem, inside_model, template
from fire_megatron.config.rules.facts import Role
from fire_megatron.config.section import build
from fire_megatron.platform.launcher import launched_rank, launched_world_size

if TYPE_CHECKING:
    from fire_megatron.evaluation.standalone import EvaluationJob
    from fire_megatron.platform.device import Device
    from fire_megatron.platform.launch import World
    from fire_megatron.platform.watch import Watch


def _mapping(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise argparse.ArgumentTypeError(f"{text!r}: write a JSON object")
    return values


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fire_megatron.evaluate",
        description="Sample answers to benchmarks and judge them: avg@k, pass@k and maj@k. Under torchrun the answers "
        "are shared among the ranks. The same command continues what was stopped.",
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", metavar="DIR", help="converted checkpoint, or a step of a run")
    model.add_argument("--hf", metavar="DIR", help="Hugging Face folder; converted for the time of loading")
    add = parser.add_argument
    add(
        "--benchmark",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="problems with answers: .jsonl, .json, .csv, .parquet",
    )
    add("--problem-key", metavar="KEY", help="of a problem's text (problem, question, query, prompt)")
    add("--answer-key", metavar="KEY", help="of the right answer (answer, final_answer, expected_answer, ...)")
    add("--samples", type=int, default=1, metavar="K", help="answers to each problem (1)")
    add("--limit", type=int, default=0, metavar="N", help="problems of each file, from its start (all)")
    add("--temperature", type=float, default=1.0, help="0 takes the likeliest token (1.0)")
    add("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this mass (1.0)")
    add("--max-new-tokens", type=int, default=4096, metavar="N", help="longest answer (4096)")
    add("--batch-size", type=int, default=16, metavar="N", help="answers a replica samples at once (16); 0: its share")
    stop = "ends an answer besides the tokenizer's own; as in rollout.stop_tokens of the recipe; may be repeated"
    add("--stop-token", action="append", default=[], metavar="TOKEN", help=stop)
    add("--seed", type=int, default=7, help="seeds the sampling (7)")
    add("--system-prompt", metavar="TEXT", help="system message before every problem")
    add(
        "--chat-template", choices=("auto", "on", "off"), default="auto", help="auto uses the tokenizer's if it has one"
    )
    add(
        "--chat-template-kwargs", type=_mapping, default={}, metavar="JSON",
        help="variables of the chat template, such as '{\"enable_thinking\": false}'",
    )  # fmt: skip
    add("--tensor", type=int, default=1, metavar="N", help="tensor-parallel ranks of a replica (1)")
    add("--pipeline", type=int, default=1, metavar="N", help="pipeline stages of a replica (1)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes CUDA if there")
    formats = ("auto", "float32", "bfloat16")
    add("--dtype", choices=formats, default="auto", help="auto: bfloat16 on GPUs, else float32")
    add("--out", type=Path, metavar="DIR", help="results (evaluation/NAME beside the model)")
    add("--timeout", type=float, default=600.0, metavar="S", help="a rank may be waited for so long (600)")
    return parser


_OPTIONS = {
    "path": "--benchmark",
    "collective_timeout": "--timeout",
    "checkpoint": "--checkpoint or --hf",
    "parallel": "--tensor and --pipeline",
}
"""Keys of a recipe that options have other names for."""


def _option(key: str) -> str:
    """The option that stands for a recipe's key."""
    name = key.rpartition(".")[2]
    return _OPTIONS.get(name, f"--{name.replace('_', '-')}")


def _refuse(problems: Iterable[RecipeProblem]) -> None:
    """Raises RecipeError: all of them, by option, if there are any."""
    text = "\n".join(dict.fromkeys(f"{problem.key}: {problem.text}" for problem in problems))
    if text:
        raise RecipeError(text)


def _sections(args: argparse.Namespace) -> tuple[EvaluationConfig, schema.ParallelConfig]:
    """What a recipe would say. Raises RecipeError: an option out of its range."""
    names = ("samples", "limit", "temperature", "top_p", "max_new_tokens", "batch_size", "problem_key", "answer_key")
    benchmarks = [{"path": path, **{name: getattr(args, name) for name in names}} for path in args.benchmark]
    try:
        build(schema.RunConfig, {"name": "-", "dir": "-", "steps": 1, "collective_timeout": args.timeout})
        evaluation = build(EvaluationConfig, {"benchmarks": benchmarks, "seed": args.seed})
        parallel = build(schema.ParallelConfig, {"tensor": args.tensor, "pipeline": args.pipeline})
    except RecipeProblems as error:
        _refuse(RecipeProblem(_option(problem.key), problem.text) for problem in error.problems)
        raise
    _refuse(RecipeProblem(f"--benchmark {path}", text) for path in args.benchmark if (text := file_problem(Path(path))))
    inside = inside_model(_out(args))
    _refuse([RecipeProblem(f"--out {_out(args)}", inside)] if inside else [])
    named = [(f"--benchmark {path}", benchmark_name(path)) for path in args.benchmark]
    _refuse(benchmark_names(named, "rename one of the files"))
    return evaluation, parallel


def _role(args: argparse.Namespace, parallel: schema.ParallelConfig, kind: str) -> schema.RoleConfig:
    """The model as a recipe would name it, computed on a device of kind ``cpu`` or ``cuda``."""
    precision = schema.PrecisionConfig(dtype=None if args.dtype == "auto" else args.dtype).on(kind)
    return schema.RoleConfig(checkpoint=args.hf or args.checkpoint, parallel=parallel, precision=precision)


def _check(args: argparse.Namespace) -> None:
    """What options and JSON files tell without torch, whose import takes seconds. Raises UserError: a mistake."""
    _, parallel = _sections(args)
    if args.hf is not None:
        shape, _ = read_hf_folder(Path(args.hf))
    else:
        require_checkpoint(Path(args.checkpoint))
        shape = read_hf_config(args.checkpoint)
    role = _role(args, parallel, "cpu" if args.device == "cpu" else "cuda")
    _refuse(role_problems(Role(_option, role, trains=False, shape=shape, ranks=launched_world_size())))


def _out(args: argparse.Namespace) -> Path:
    """Where the results go."""
    folder = Path(args.hf or args.checkpoint).absolute()
    return args.out or folder.parent / "evaluation" / folder.name


def _read(args: argparse.Namespace, device: Device, begun: datetime) -> EvaluationJob:
    """Everything but the weights. Args: begun: when the evaluation was, the same on every rank.

    Raises:
        UserError: what is wrong.
    """
    from fire_megatron.data.chat_time import chat_time
    from fire_megatron.data.encoder import Encoder
    from fire_megatron.data.tokenizer import load_tokenizer, missing_stops, stop_ids
    from fire_megatron.evaluation.benchmarks import BenchmarkTask, read_benchmark
    from fire_megatron.evaluation.judge import require_math_verify
    from fire_megatron.evaluation.source import open_source
    from fire_megatron.evaluation.standalone import EvaluationJob
    from fire_megatron.models.build import this_machine

    require_math_verify()
    config, parallel = _sections(args)
    benchmarks = [read_benchmark(entry) for entry in config.benchmarks]
    source = open_source(args.hf or args.checkpoint, is_hf=args.hf is not None)
    tokenizer = load_tokenizer(source.folder)
    data = DataConfig(
        train=tuple(SourceConfig(path=path) for path in args.benchmark),
        chat_template=args.chat_template,
        system_prompt=args.system_prompt,
        max_prompt_tokens=MOST,
        too_long="error",
    )
    role = _role(args, parallel, device.kind)
    known = {"ranks": launched_world_size(), "kind": device.kind, "machine": this_machine(device)}
    model = Role(_option, role, trains=False, shape=source.shape, tokenizer=tokenizer, **known)
    _refuse([*role_problems(model), *template(data, tokenizer, _option)])
    encode = Encoder(data, tokenizer, args.chat_template_kwargs, key="--chat-template-kwargs")
    ends = stop_ids(tokenizer, args.stop_token, "--stop-token")
    endings = {"the chat template": [tokenizer.turn_end() if encode.use_template else None]}
    warning = missing_stops(tokenizer, ends, endings, "--stop-token")
    if warning and launched_rank() == 0:
        print(warning)
    common = {"positions": source.shape.max_positions, "seed": config.seed, "stop_ids": ends}
    read = zip(benchmarks, config.benchmarks, strict=True)
    with chat_time(begun):
        tasks = [BenchmarkTask.of(benchmark, entry, encode, **common) for benchmark, entry in read]
    fixed = ("temperature", "top_p", "max_new_tokens", "seed", "system_prompt", "chat_template", "stop_token")
    fixed += ("chat_template_kwargs",) if args.chat_template_kwargs else ()
    return EvaluationJob(
        source=source,
        role=role,
        tokenizer=tokenizer,
        tasks=tasks,
        settings={name: getattr(args, name) for name in fixed} | {"dtype": role.precision.dtype},
        out=_out(args),
        timeout=args.timeout,
        begun=begun,
    )


def _evaluate(args: argparse.Namespace, world: World, watch: Watch) -> None:
    """Read, sample, score. Raises UserError on every rank, if any finds something wrong."""
    import torch.distributed as dist

    from fire_megatron.evaluation.generations import begun_at
    from fire_megatron.evaluation.standalone import Evaluation
    from fire_megatron.parallel.collectives import all_gather_objects, on_all_ranks
    from fire_megatron.train.interrupt import StopRequest

    stop = StopRequest().install()
    begun = all_gather_objects(begun_at(_out(args)), group=dist.group.WORLD)[0]
    job = on_all_ranks(_read, args, world.device, begun, group=dist.group.WORLD)
    Evaluation(job, world, watch, lambda: stop.signal_name).run()
    stop.restore()


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate.

    Exit codes: 0 done or stopped on request with everything saved, 2 a mistake in the input, 3 another rank has died or
    failed, 130 interrupted twice.
    """
    args = _parser().parse_args(argv)

    def work(_: object) -> None:
        from fire_megatron.platform import launch

        world = launch.start(args.device, timeout=args.timeout)
        supervised(world, lambda watch: _evaluate(args, world, watch), held="the model", timeout=args.timeout)

    return run_command(lambda: _check(args), work)
