"""Evaluating on several ranks gives what one process gives, byte by byte, in any layout and after a change of it."""

import json
import subprocess
import time
from datetime import datetime

import pytest
import torch.distributed as dist
from boxed_models import make_model, write_benchmark
from processes import command, environment
from roles import Roles

from fire_megatron.cli.evaluate import _parser, _read
from fire_megatron.config.data import BenchmarkConfig, DataConfig, SourceConfig
from fire_megatron.config.errors import UserError
from fire_megatron.data.encoder import Encoder
from fire_megatron.data.tokenizer import load_tokenizer
from fire_megatron.evaluation.benchmarks import BenchmarkTask, encode_problems, read_benchmark
from fire_megatron.evaluation.during import measure_benchmarks
from fire_megatron.evaluation.generations import PARTS
from fire_megatron.evaluation.runner import BenchmarkRunner
from fire_megatron.evaluation.standalone import Evaluation
from fire_megatron.parallel.grid import Layout
from fire_megatron.platform import launch
from fire_megatron.rollout.engine import MegatronEngine
from fire_megatron.rollout.sampling import Sampling

FIXED = "--samples 3 --max-new-tokens 16 --batch-size 3 --device cpu"
DATA = DataConfig(train=(SourceConfig(path="none"),))
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def inputs(world, folder):
    if not world.is_main:
        dist.barrier()
        yield folder
        return
    make_model(folder / "model")
    write_benchmark(folder / "sums.jsonl", 5)
    write_benchmark(folder / "more.jsonl", 2)
    dist.barrier()
    with (folder / "alone.log").open("w") as log, _alone(folder, log) as process:
        yield folder
        process.kill()


def _alone(folder, log):
    """One plain process, from the command line, meanwhile."""
    variables = {name: value for name, value in environment().items() if name not in LAUNCHER}
    words = command("-m", "fire_megatron.evaluate", *_arguments(folder, folder / "alone"), "--batch-size", 5)
    return subprocess.Popen(words, env=variables, stdout=log, stderr=log)


def alone(folder):
    """Where that process has put its results; each rank waits for them by itself, however long it takes."""
    deadline = time.monotonic() + 300
    while not (folder / "alone" / "scores.json").exists():
        assert time.monotonic() < deadline, (folder / "alone.log").read_text()
        time.sleep(0.2)
    return folder / "alone"


def _arguments(folder, out):
    benchmarks = [str(folder / name) for name in ("sums.jsonl", "more.jsonl")]
    return ["--checkpoint", str(folder / "model"), "--benchmark", *benchmarks, "--out", str(out), *FIXED.split()]


def evaluate(world, folder, out, *options, stopped=lambda: None):
    """The command as ranks that are there already run it."""
    args = _parser().parse_args([*_arguments(folder, folder / out), *options])
    job = _read(args, world.device, datetime(2026, 1, 1))
    return Evaluation(job, world, launch.watch(world, roles="the model", timeout=60), stopped).run()


def results(folder):
    return [(folder / name).read_text() for name in ("sums.jsonl", "more.jsonl", "scores.json")]


@pytest.mark.parametrize("layout", ["", "--tensor 2", "--pipeline 2"])
def test_every_layout_is_one_process(world, inputs, layout):
    out = "out" + layout.replace(" ", "")
    scores = evaluate(world, inputs, out, *layout.split())
    assert results(inputs / out) == results(alone(inputs))
    assert not (inputs / out / PARTS).exists()
    reported = json.loads((inputs / out / "scores.json").read_text())["benchmarks"]
    assert {name: result.as_dict() for name, result in scores.items()} == reported, "the same on every rank"
    assert 0 < scores["sums"].average.value < 1


def test_a_stop_of_one_rank_ends_all_and_another_layout_continues(world, inputs):
    asked = []

    def stopped():
        """The last rank is signalled after its first question."""
        asked.append(1)
        return "SIGTERM" if world.rank == world.size - 1 else None

    assert evaluate(world, inputs, "stopped", stopped=stopped) is None
    assert not (inputs / "stopped" / "scores.json").exists()
    evaluate(world, inputs, "stopped", "--tensor", "2")
    assert results(inputs / "stopped") == results(alone(inputs))


def test_a_folder_that_only_rank_0_finds_wrong(world, inputs):
    with pytest.raises(UserError, match="--seed: "):
        evaluate(world, inputs, "out", "--seed", "8")
    with pytest.raises(UserError, match="does not divide"):
        evaluate(world, inputs, "other", "--tensor", "3")


def measure(world, roles, folder, path, layout, out):
    """The first benchmark in training's way, on a model that is loaded in some layout: metrics, answers, scores."""
    model, grid = roles.build(path, layout)
    tokenizer = load_tokenizer(path)
    benchmark = read_benchmark(BenchmarkConfig(path=str(folder / "sums.jsonl")))
    prompts = encode_problems(benchmark, Encoder(DATA, tokenizer), room=400)
    sampling = Sampling(max_new_tokens=16, batch_size=4, stop_ids=frozenset(tokenizer.eos_ids), seed=7)
    waiting = roles.factory.cpu_group(range(world.size), purpose="evaluation")
    runner = BenchmarkRunner([BenchmarkTask(benchmark, prompts, 3, sampling)], tokenizer, grid, waiting)
    metrics = measure_benchmarks(runner, MegatronEngine(model, grid), out, stopped=lambda: False)
    dist.barrier()
    return metrics, (out / "sums.jsonl").read_text(), json.loads((out / "scores.json").read_text())["sums"]


@pytest.mark.parametrize("sizes", [{"pipeline": 2}, {"context": 2}], ids=str)
def test_a_benchmark_in_training_is_the_command(world, inputs, sizes):
    roles = Roles(world, inputs)
    layout = Layout(**sizes, num_ranks=world.size)
    metrics, written, scores = measure(world, roles, inputs, inputs / "model", layout, inputs / f"training{sizes}")
    assert written == (alone(inputs) / "sums.jsonl").read_text()
    assert scores == json.loads((alone(inputs) / "scores.json").read_text())["benchmarks"]["sums"]
    assert metrics["eval/sums/maj@3"] == scores["maj@3"]["value"]


def test_replicas_that_share_experts(world, inputs):
    """They sample in rounds, also those that have no answer left to sample."""
    roles, path = Roles(world, inputs), inputs / "experts"
    if world.is_main:
        make_model(path, "qwen3-moe")
    dist.barrier()
    apart, shared = (
        measure(world, roles, inputs, path, Layout(expert=size, num_ranks=world.size), inputs / f"experts{size}")
        for size in (1, 2)
    )
    assert apart == shared
