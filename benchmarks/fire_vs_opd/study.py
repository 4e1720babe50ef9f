"""The study's parts in order: problems, teachers, students, runs. What is there already is not made again."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import sides
from benchmarks.fire_vs_opd.pretrain import Training, train
from benchmarks.fire_vs_opd.tasks import DOMAINS, is_right, problems
from fire_megatron.config.load import load_recipe
from fire_megatron.config.schema import Recipe
from fire_megatron.metrics.jsonl import read_metrics

HERE = Path(__file__).resolve().parent
RECIPE = HERE / "recipe.yaml"
FILTER, REWEIGHT = "{name: filter, percentile: 20}", "{name: reweight, alpha: 1.0, beta: 1.0}"
ARMS: Mapping[str, str] = {
    "opd": "[]",
    "filter": f"[{FILTER}]",
    "reweight": f"[{REWEIGHT}]",
    "fire": f"[{FILTER}, {REWEIGHT}]",
}
"""Name -> ``loss.hooks``; with the paper's defaults."""
CONTROLS: Mapping[str, str] = {"random": "[{name: drop_random, percentile: 20}]"}
"""The same of arms that are not FiRe's, whose hooks are in controls.py."""
TEACHER_STEPS = {"math": 1400, "code": 900}
TEACHERS = {label: Training((label,), layers=3, hidden=96, steps=steps) for label, steps in TEACHER_STEPS.items()}
STUDENT = Training(tuple(DOMAINS), layers=2, hidden=64, steps=1500, lr=3e-3, stop_at=650)
"""Its warm-up ends where it gets some answers right and most wrong."""
TRAIN_PROBLEMS, HELD_OUT_PROBLEMS = 4000, 500
_TRAIN_SEED, _HELD_OUT_SEED = 1, 2


TOY = {"run.steps": 2, "optimizer.warmup_steps": 1, "rollout.prompts_per_step": 16, "rollout.max_new_tokens": 4}
"""Settings of the runs of a test."""


@dataclass(frozen=True)
class Study:
    """A folder that the study is made in."""

    out: Path
    say: Callable[[str], None] = print
    toy: bool = False
    """A few problems and steps, to see that all of it runs."""

    # ---- problems ---------------------------------------------------------------------------------------------

    @property
    def held_out(self) -> dict[str, list[str]]:
        """By domain; the same in every study."""
        return {label: problems(label, 4 if self.toy else HELD_OUT_PROBLEMS, seed=_HELD_OUT_SEED) for label in DOMAINS}

    def _without(self) -> frozenset[str]:
        return frozenset(problem for of_label in self.held_out.values() for problem in of_label)

    def prompts(self, label: str) -> Path:
        """The prompt file that the students sample from."""
        path = self.out / "data" / f"train_{label}.jsonl"
        if not path.exists():
            rows = problems(label, 16 if self.toy else TRAIN_PROBLEMS, seed=_TRAIN_SEED, without=self._without())
            _write(path, "".join(json.dumps({"problem": problem, "label": label}) + "\n" for problem in rows))
        return path

    # ---- models -----------------------------------------------------------------------------------------------

    def teacher(self, label: str) -> Path:
        """The converted specialist of a domain."""
        return self._model(label, TEACHERS[label], seed=1000 + list(DOMAINS).index(label))

    def student(self, seed: int) -> Path:
        """The converted student of a seed, warmed up on both domains."""
        return self._model(f"student_{seed}", STUDENT, seed=seed)

    def _model(self, name: str, training: Training, *, seed: int) -> Path:
        from fire_megatron.checkpoint.convert import hf_to_megatron

        folder = self.out / "models" / name
        if not folder.exists():
            hf = self.out / "models" / f"hf_{name}"
            started = time.perf_counter()
            if self.toy:
                training = replace(training, layers=1, hidden=32, steps=2, batch=4, stop_at=0)
            train(training, hf, seed=seed, without=self._without())
            hf_to_megatron(hf, folder)
            self.say(f"{name}: trained in {time.perf_counter() - started:.0f} s")
        return folder

    # ---- runs -------------------------------------------------------------------------------------------------

    def overrides(self, arm: str, seed: int, **changes: object) -> dict[str, object]:
        """What the arm's run changes in recipe.yaml; ``changes`` are dotted keys with ``__`` for dots."""
        name = self.run_name(arm, seed, **changes)
        values = {
            "run.name": name,
            "run.dir": self.out / "runs" / name,
            "run.seed": seed,
            "student.checkpoint": self.out / "models" / f"student_{seed}",
            **{f"teachers.{label}.checkpoint": self.out / "models" / label for label in DOMAINS},
            **{f"data.train.{i}.path": self.out / "data" / f"train_{label}.jsonl" for i, label in enumerate(DOMAINS)},
            "loss.hooks": {**ARMS, **CONTROLS}[arm],
            **({"run.plugins": "[benchmarks.fire_vs_opd.controls]"} if arm in CONTROLS else {}),
            **(TOY if self.toy else {}),
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
        return values

    @staticmethod
    def run_name(arm: str, seed: int, **changes: object) -> str:
        """``fire_3``, or with what it changes: ``opd_9_optimizer.lr=0.001``."""
        return "_".join([arm, str(seed), *(f"{key.replace('__', '.')}={value}" for key, value in changes.items())])

    def recipe(self, arm: str, seed: int) -> Recipe:
        """The recipe of a run, every default filled in."""
        return load_recipe(RECIPE, [f"{key}={value}" for key, value in self.overrides(arm, seed).items()])

    def distil(self, arm: str, seed: int, **changes: object) -> dict[str, Any]:
        """Train an arm with ``fire_megatron.train`` in a process of its own and measure the student that comes out."""
        name = self.run_name(arm, seed, **changes)

        def make() -> dict[str, Any]:
            run, started = self.out / "runs" / name, time.perf_counter()
            shutil.rmtree(run, ignore_errors=True)  # of a run that was broken off
            sides.train(1, self.overrides(arm, seed, **changes), recipe=RECIPE, toy=self.toy)
            seconds = time.perf_counter() - started
            found = self._evaluate(max((run / "checkpoints").glob("step_*")))
            curve = rollout_curve(run)
            shutil.rmtree(run / "checkpoints")
            return {"arm": arm, "seed": seed, "changes": changes, **found, "train_seconds": seconds, **curve}

        return self._once(name, make)

    def measure(self, name: str) -> dict[str, Any]:
        """Accuracy of a model before any distillation."""
        return self._once(name, lambda: {"model": name, **self._evaluate(self.out / "models" / name)})

    def _evaluate(self, checkpoint: Path) -> dict[str, Any]:
        from benchmarks.fire_vs_opd.evaluate import evaluate

        return evaluate(checkpoint, self.held_out)

    def _once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of that name; made and written if it is not there."""
        path = self.out / "results" / f"{name}.json"
        if not path.exists():
            found = make()
            _write(path, json.dumps(found, indent=1))
            self.say(f"{name}: {summary(found)}")
        return json.loads(path.read_text(encoding="utf-8"))


def summary(result: Mapping[str, Any]) -> str:
    """One line on a result."""
    parts = [
        f"{label} {way} {100 * value:.1f} %"
        for label, ways in result["accuracy"].items()
        for way, value in ways.items()
    ]
    seconds = result.get("train_seconds")
    return ", ".join(parts) + (f" after {seconds:.0f} s of training" if seconds else "")


def rollout_curve(run: Path) -> dict[str, Any]:
    """From a run's files, by step: the share of its samples that were right, by domain, its reverse KL to the domain's
    teacher (nats a token), the share of rows that trained and the tokens sampled in all. Digests of the first step's
    samples and of the prompts of all steps tell whether two runs had the same."""
    marks: dict[str, dict[int, list[bool]]] = {label: {} for label in DOMAINS}
    samples = _lines(run / "samples.jsonl")
    for line in samples:
        right = is_right(line["teacher"], line["prompt"], line["response"], truncated=line["truncated"])
        marks[line["teacher"]].setdefault(line["step"], []).append(right)
    metrics = [line for line in read_metrics(run) if line["step"] > 0]
    return {
        "rollout_accuracy": {
            label: [sum(of_step[step]) / len(of_step[step]) for step in sorted(of_step)]
            for label, of_step in marks.items()
        },
        "reverse_kl": {label: [line[f"teacher/{label}/reverse_kl"] for line in metrics] for label in DOMAINS},
        "first_rollouts": _digest([(r["row"], r["prompt"], r["response"]) for r in samples if r["step"] == 1]),
        "prompts": _digest([(r["step"], r["row"], r["prompt"]) for r in samples]),
        "keep_ratio": sum(line["fire/keep_ratio"] for line in metrics) / len(metrics),
        "rows_sampled": sum(len(of_step) for steps in marks.values() for of_step in steps.values()),
        "tokens_sampled": sum(line["rollout/tokens"] for line in metrics),
        "step_seconds": sum(line["time/step"] for line in metrics) / len(metrics),
    }


def _digest(values: list[tuple[Any, ...]]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
