"""No key of a recipe lies: each is turned in a run of one rank, and something changes, or something is said.

What may change: the exit code, what is printed, metrics, files of the run's folder, the models that are built, and how
often each function of the package is called, which shows keys that change memory and speed alone.
"""

from __future__ import annotations

import collections
import re
import shutil
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from boxed_models import write_benchmark
from tiny_run import make_inputs, read_metrics, train

import fire_megatron
from fire_megatron.config.loss import BUILTIN_HOOKS
from fire_megatron.config.messages import all_keys
from fire_megatron.config.schema import Recipe, RolloutConfig
from fire_megatron.platform import launch
from fire_megatron.train import models

PACKAGE = str(Path(fire_megatron.__file__).parent)
UNCOUNTED = ("config/", "platform/watch", "platform/host", "platform/cpu_seam", "metrics/", "checkpoint/")
"""Where calls depend on the recipe's text, on time, or on threads."""
Changes = dict[str, Any]

ROLE: dict[str, tuple[Any, Changes]] = {
    "checkpoint": ("code", {}),
    "ranks": ("1-1", {}),
    **{f"parallel.{name}": (2, {}) for name in ("tensor", "pipeline", "context", "expert")},
    "parallel": ({"tensor": 2}, {}),
    "parallel.sequence": (True, {}),
    "precision": ({"dtype": "bfloat16"}, {}),
    "precision.dtype": ("bfloat16", {}),
    "precision.fp8": ({"emulate": True}, {}),
    "precision.fp8.format": ("e4m3", {"emulate": True}),
    "precision.fp8.recipe": ("blockwise", {"emulate": True}),
    "precision.fp8.first_last_bf16": (1, {"emulate": True}),
    "precision.fp8.amax_history": (1, {"emulate": True}),
    "precision.fp8.amax_algorithm": ("most_recent", {"emulate": True}),
    "precision.fp8.margin": (3, {"emulate": True}),
    "precision.fp8.param_gather": (True, {"emulate": True}),
    "precision.fp8.emulate": (True, {}),
    "layer_spec": ("local", {}),
    "vocab_multiple": (128, {}),
    "megatron": ({"recompute_granularity": "selective"}, {}),
    "megatron_untested": (True, {}),
    "offload": (True, {}),
    "chat_template_kwargs": ({"brief": True}, {}),
    "labels": (["algebra"], {}),
    "micro_batch_tokens": (8, {}),
}
FULL = {"loss.estimator": "full"}
PROBLEMS = {
    "evaluation.benchmarks": [{"path": "{inputs}/problems.jsonl", "max_new_tokens": 4}],
    "evaluation.at_start": False,  # once says as much
}
TURNS: dict[str, tuple[Any, Changes]] = {
    "run.dir": ("{inputs}/elsewhere", {}),
    "run.steps": (2, {}),
    "run.seed": (1, {}),
    "run.device": ("cuda", {}),
    "run.collective_timeout": (50.0, {}),
    "run.resume": ("must", {}),
    "run.threads": (2, {}),
    "run.plugins": (["no_such_module"], {}),
    "data.train": ([{"path": "{inputs}/code.jsonl"}], {}),
    "data.train.0.path": ("{inputs}/held_out.jsonl", {}),
    "data.train.0.label": ("code", {}),
    "data.train.0.limit": (1, {}),
    "data.prompt_key": ("question", {}),
    "data.messages_key": ("chat", {"data.train.0.path": "{inputs}/messages.jsonl"}),
    "data.label_key": ("topic", {}),
    "data.chat_template": ("on", {}),
    "data.system_prompt": ("w7", {}),
    "data.chat_template_kwargs": ({"brief": True}, {}),
    "data.max_prompt_tokens": (5, {}),
    "data.too_long": ("error", {"data.max_prompt_tokens": 5}),
    "data.shuffle": (False, {}),
    "rollout.prompts_per_step": (2, {}),
    "rollout.samples_per_prompt": (2, {}),
    "rollout.max_new_tokens": (3, {}),
    "rollout.temperature": (0.5, {}),
    "rollout.top_p": (0.5, {}),
    "rollout.stop_tokens": (["w7", "w8", "w9"], {}),
    "rollout.batch_size": (1, {}),
    "rollout.sync_every": (3, {}),
    "rollout.cuda_graphs": (False, {}),
    "rollout.keep_cache": (True, {}),
    "rollout.group_size": (1, {}),
    "loss.estimator": ("topk", {}),
    "loss.divergence": ("forward_kl", FULL),
    "loss.beta": (0.9, FULL | {"loss.divergence": "jensen_shannon"}),
    "loss.skew": (0.5, FULL | {"loss.divergence": "skewed_forward_kl"}),
    "loss.top_k": (3, {"loss.estimator": "topk"}),
    "loss.temperature": (2.0, {}),
    "loss.student_temperature": (2.0, FULL),
    "loss.teacher_temperature": (2.0, FULL),
    "loss.mixture": ("log_probs", FULL),
    "loss.chunk_tokens": (2, {}),
    "loss.clip": (1e-5, {"optimizer.mini_batches": 2}),
    "loss.importance": ({"mode": "off"}, {}),
    "loss.importance.mode": ("off", {}),
    "loss.importance.low": (1.5, {"loss.importance.mode": "mask"}),
    "loss.importance.high": (0.5, {}),
    "loss.hooks": ([], {}),
    "loss.hooks.0.name": ("reweight", {"loss.hooks": [{"name": "filter"}]}),
    "loss.hooks.filter.percentile": (60, {}),
    "loss.hooks.filter.scope": ("microbatch", {}),
    "loss.hooks.filter.group_by": ("batch", {}),
    "loss.hooks.filter.drop_truncated": (True, {}),
    "loss.hooks.reweight.alpha": (0.0, {}),
    "loss.hooks.reweight.beta": (0.0, {}),
    "loss.hooks.reweight.scope": ("microbatch", {"optimizer.micro_batch_size": 2}),
    "loss.hooks.reweight.group_by": ("batch", {}),
    "loss.hooks.reweight.normalise_over": ("all", {}),
    "optimizer.lr": (1e-4, {}),
    "optimizer.min_lr": (1e-3, {"optimizer.schedule": "linear"}),
    "optimizer.schedule": ("linear", {}),
    "optimizer.warmup_steps": (2, {}),
    "optimizer.weight_decay": (0.5, {}),
    "optimizer.betas": ([0.5, 0.5], {}),
    "optimizer.eps": (0.1, {}),
    "optimizer.clip_grad": (1e-3, {"optimizer.eps": 0.1}),
    "optimizer.micro_batch_size": (2, {}),
    "optimizer.micro_batch_tokens": (60, {}),
    "optimizer.mini_batches": (2, {}),
    "optimizer.guard": ({"spike_factor": 1e-9, "spike_window": 1}, {}),
    "optimizer.guard.max_skipped": (0, {"optimizer.guard": {"spike_factor": 1e-9, "spike_window": 1}}),
    "optimizer.guard.spike_factor": (1e-9, {"optimizer.guard": {"spike_factor": 1e9, "spike_window": 1}}),
    "optimizer.guard.spike_window": (99, {"optimizer.guard": {"spike_factor": 1e-9, "spike_window": 1}}),
    "checkpoint.every": (1, {}),
    "checkpoint.dir": ("{inputs}/saved", {}),
    "checkpoint.keep": (1, {"checkpoint.every": 1}),
    "checkpoint.final": (True, {}),
    "checkpoint.async_save": (True, {"checkpoint.every": 1}),
    "evaluation.every": (1, {}),
    "evaluation.benchmarks": (PROBLEMS["evaluation.benchmarks"], {}),
    "evaluation.benchmarks.0.path": ("{inputs}/others.jsonl", PROBLEMS),
    "evaluation.benchmarks.0.problem_key": ("text", PROBLEMS),
    "evaluation.benchmarks.0.answer_key": ("text", PROBLEMS),
    "evaluation.benchmarks.0.name": ("sums", PROBLEMS),
    "evaluation.benchmarks.0.samples": (2, PROBLEMS),
    "evaluation.benchmarks.0.limit": (1, PROBLEMS),
    "evaluation.benchmarks.0.max_new_tokens": (2, PROBLEMS),
    "evaluation.benchmarks.0.temperature": (0.5, PROBLEMS),
    "evaluation.benchmarks.0.top_p": (0.2, PROBLEMS),
    "evaluation.benchmarks.0.batch_size": (1, PROBLEMS),
    "evaluation.chat_template_kwargs": ({"brief": True}, {}),
    "evaluation.prompts": ([], {}),
    "evaluation.prompts.0.path": ("{inputs}/code.jsonl", {}),
    "evaluation.prompts.0.label": ("code", {}),
    "evaluation.prompts.0.limit": (1, {}),
    "evaluation.num_prompts": (1, {}),
    "evaluation.max_new_tokens": (3, {}),
    "evaluation.at_start": (False, {}),
    "evaluation.at_end": (False, {}),
    "evaluation.seed": (8, {}),
    "metrics.console": (True, {}),
    "metrics.jsonl": (False, {}),
    "metrics.samples": (2, {}),
    "metrics.gpu_interval": (0.0, {}),
}
ELSEWHERE = {
    "run.name": "people see it in a report and in a plan",
    "optimizer.distributed": "it takes several replicas: distributed/test_experts.py has them",
    "metrics.tensorboard": "it takes the package: unit/metrics/test_metrics_logger.py",
    "metrics.trackers": "they take their packages: unit/metrics/test_trackers.py",
    "run.max_restarts": "test_random_kills.py restarts runs",
}
"""Keys that a run which ends well cannot show."""


def turns() -> dict[str, tuple[Any, Changes]]:
    """With the keys of the roles, at one of each."""
    every = dict(TURNS)
    for role in ("student", "teachers.math"):
        for key, (value, fp8) in ROLE.items():
            late = role == "student" and key.rpartition(".")[2] in ("amax_history", "amax_algorithm", "margin")
            base = {f"{role}.precision.fp8": fp8 | ({"recipe": "delayed"} if late else {})} if fp8 else {}
            if role != "student" or key not in ("chat_template_kwargs", "labels", "micro_batch_tokens"):
                every[f"{role}.{key}"] = (value, base)
    return every


def test_every_key_of_the_schema_is_turned():
    keys = {re.sub("^teachers.NAME", "teachers.math", key) for key in all_keys(Recipe)}
    keys |= {f"loss.hooks.{name}.{key}" for name, options in BUILTIN_HOOKS.items() for key in options.model_fields}
    sections = {key for key in keys if any(other.startswith(f"{key}.") for other in keys)} - turns().keys()
    alone = {"rollout.engine"}
    assert len(get_args(RolloutConfig.model_fields["engine"].annotation)) == 1
    assert keys - sections - alone == turns().keys() | ELSEWHERE.keys()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = make_inputs(tmp_path_factory.mktemp("keys"), num_hidden_layers=1)
    shutil.copy(folder / "math.jsonl", folder / "held_out.jsonl")
    rows = (folder / "math.jsonl").read_text().splitlines()
    (folder / "held_out.jsonl").write_text("\n".join(rows[:2]) + "\n")
    message = '{"messages": [{"role": "user", "content": "w7 w8"}], "label": "math"}\n'
    (folder / "messages.jsonl").write_text(message)
    write_benchmark(folder / "problems.jsonl", 2)
    write_benchmark(folder / "others.jsonl", 3)
    assert train(folder, folder / "first", run__steps=1, metrics__samples=1) == 0  # modules are imported once
    return folder


class Observed:
    """Runs of the tiny recipe, each in a folder of its own, and what they left."""

    def __init__(self, inputs, tmp_path, capfd, monkeypatch):
        self.inputs, self.tmp_path, self.capfd, self.monkeypatch = inputs, tmp_path, capfd, monkeypatch

    def run(self, name: str, changes: Changes) -> dict[str, Any]:
        """What a run with these values at dotted keys does."""
        folder, calls, seen = self.tmp_path / name, collections.Counter(), []
        self._spy(seen)
        overrides = [f"{key}={self._yaml(value)}" for key, value in changes.items()]
        common = {
            "run__steps": 3, "run__threads": 1, "checkpoint__final": False, "optimizer__lr": 1e-2,
            "evaluation": {"prompts": [{"path": str(self.inputs / "held_out.jsonl")}], "max_new_tokens": 4},
        }  # fmt: skip

        def count(frame: Any, event: str, _: Any) -> None:
            code = frame.f_code
            if event == "call" and code.co_filename.startswith(PACKAGE):
                place = code.co_filename[len(PACKAGE) + 1 :]
                if not place.startswith(UNCOUNTED) and code.co_qualname != "<module>":
                    calls[f"{place} {code.co_qualname}"] += 1

        sys.setprofile(count)
        try:
            code = train(self.inputs, folder, *overrides, **common)
        finally:
            sys.setprofile(None)
        out, err = self.capfd.readouterr()
        text = re.sub(r"[\d.]+ s\b", "", f"{out}\n{err}".replace(str(folder), "RUN"))
        metrics = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
        timeless = [{k: v for k, v in row.items() if not re.match("time|memory|.*per_second", k)} for row in metrics]
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "events" not in path.name)
        files += [path.read_text() for path in sorted(folder.glob("evaluation/*/*.jsonl"))]
        return {"code": code, "text": text, "metrics": timeless, "files": files, "calls": calls, "seen": seen}

    def _yaml(self, value: Any) -> str:
        import yaml

        return (
            yaml.safe_dump(value, default_flow_style=True, width=1000)
            .removesuffix("...\n")
            .strip()
            .replace("{inputs}", str(self.inputs))
        )

    def _spy(self, seen: list[Any]) -> None:
        start, build = launch.start, models.build_model

        def started(*args: Any, **settings: Any) -> Any:
            seen.append((settings["timeout"], settings["threads"]))
            return start(*args, **settings)

        def built(*args: Any, **settings: Any) -> Any:
            model = build(*args, **settings)
            seen.append(sum(parameter.numel() for parameter in model.parameters()))
            return model

        self.monkeypatch.setattr(launch, "start", started)
        self.monkeypatch.setattr(models, "build_model", built)


BASES: dict[str, dict[str, Any]] = {}


@pytest.mark.parametrize("key", turns())
def test_turning_a_key_changes_something_or_says_something(inputs, tmp_path, capfd, monkeypatch, key):
    value, base = turns()[key]
    observed = Observed(inputs, tmp_path, capfd, monkeypatch)
    known = BASES.setdefault(str(base), {})
    if not known:
        known |= observed.run("base", base)
        monkeypatch.undo()
    assert known["code"] == 0 and known["metrics"], known["text"]
    if key in ("run.dir", "run.steps"):
        base = {}
    turned = observed.run("run", base | {key: value})
    different = {part for part in known if turned[part] != known[part]}
    assert different, key
    if turned["code"]:
        named = key.rpartition(".")[2] in turned["text"] or "truncated" in key  # then a run that learns nothing ends
        assert turned["code"] == 2 and named, turned["text"]


def test_the_same_recipe_does_the_same(inputs, tmp_path, capfd, monkeypatch):
    observed = Observed(inputs, tmp_path, capfd, monkeypatch)
    first = observed.run("base", {})
    monkeypatch.undo()
    second = observed.run("again", {})
    for part, value in first.items():
        assert second[part] == value, part
