"""Do sampling, training and scoring say the same of the same weights, and how far is each from float32?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fire_megatron.config.loss import LossConfig
from fire_megatron.config.schema import OptimizerConfig, PrecisionConfig
from fire_megatron.data.packing import Pack
from fire_megatron.data.rollouts import Rollouts, Target, TrainingRows
from fire_megatron.models.pipeline import run_pipeline
from fire_megatron.rollout.engine import MegatronEngine
from fire_megatron.rollout.sampling import Sampling
from fire_megatron.teachers.teacher import Teacher
from fire_megatron.train.student import Student
from gpu_checks.check import Context, Findings, rounded
from gpu_checks.models import Here, alone, prompts_of, ragged

SHARP = 5.0
"""Standard deviation of the logits, whose largest are then about 4.5 times that: where bfloat16 rounds to 0.06."""
OUTPUT_LAYER = 1e-3
"""Most that log-probs may differ from float64 of the same hidden states: they are float32 always."""
APART = 4.0
"""Times the rounding of bfloat16 layers, as the side that is nearest to float32 shows it, that two sides may be apart
on average; two that round as much, each in its own way, are 1.4 times that apart."""
LEAST = 0.01
"""Nats that they may be apart in any case."""
SIDES = ("engine", "trainer", "teacher")
PAIRS = ("engine_from_trainer", "engine_from_teacher", "teacher_from_trainer")


def agreement(context: Context) -> Findings:
    """Log-probs of sampled tokens: engine, trainer and teacher in bfloat16, against a float32 model."""
    name, rows, tokens = ("Qwen3-0.6B", 16, 64) if context.gpu else ("toy-heads-of-128", 6, 8)
    with alone(context) as here:
        model = here.model(name, dtype=here.dtype, sharp=SHARP)
        vocabulary = model.used_vocab_size
        engine, sampling = MegatronEngine(model, here.grid), Sampling(max_new_tokens=tokens, seed=1)
        prompts = prompts_of(ragged(rows, 5, 150), vocabulary)
        rollouts = engine.generate(prompts, range(rows), sampling=sampling, step=0)
        student = Student(
            model, here.grid, loss=LossConfig(), optimizer=OptimizerConfig(), precision=PrecisionConfig(here.dtype)
        )
        training = as_training_rows(rollouts)
        trainer = student.log_probs(training)
        head = _output_layer_error(here, student, training)
        del student
        texts = (rollouts.prompt_tokens, rollouts.responses)
        scored = Teacher(model, here.grid, micro_batch_tokens=8192).score(*texts)
        del model, engine
        exact_model = here.model(name, dtype="float32", spec="local", sharp=SHARP)
        exact = Teacher(exact_model, here.grid, micro_batch_tokens=2048).score(*texts)
    sides = {"engine": rollouts.log_probs, "trainer": trainer, "teacher": scored.log_probs}
    pairs = {f"{side}_from_float32": (values, exact.log_probs) for side, values in sides.items()}
    pairs |= {
        "engine_from_trainer": (rollouts.log_probs, trainer),
        "engine_from_teacher": (rollouts.log_probs, scored.log_probs),
        "teacher_from_trainer": (scored.log_probs, trainer),
        "engine_entropy_from_float32": (rollouts.entropies, exact.entropies),
        "teacher_entropy_from_float32": (scored.entropies, exact.entropies),
    }
    figures: dict[str, float | None] = {"output_layer_max": rounded(head)}
    for pair, (ours, theirs) in pairs.items():
        apart = (torch.cat(list(ours)).double() - torch.cat(list(theirs)).double()).abs()
        figures |= {f"{pair}_mean": rounded(float(apart.mean())), f"{pair}_max": rounded(float(apart.max()))}
    return Findings(_told(figures), figures, _problems(figures))


def as_training_rows(rollouts: Rollouts) -> TrainingRows:
    """Rows of a teacher that says what the student says, less a little."""
    return TrainingRows(
        rollouts=rollouts,
        targets=(Target(("t",)),) * len(rollouts),
        teacher_log_probs=tuple(values - 0.1 for values in rollouts.log_probs),
        weights=tuple(torch.ones_like(values) for values in rollouts.log_probs),
    )


def _output_layer_error(here: Here, student: Student, rows: TrainingRows) -> float:
    """Largest difference of the trainer's log-probs from those of its own hidden states in float64."""

    def last_stage(hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
        ours = student.objective.log_probs(hidden, pack)
        some = slice(0, 128)
        weight = student.model.output_weight[: student.model.used_columns]
        logits = torch.cat([hidden[some].double() @ part.double().t() for part in weight.split(16384)], dim=1)
        exact = torch.log_softmax(logits, -1).gather(1, pack.targets[some, None])[:, 0]
        return (ours[some].double() - exact).abs().max()

    with torch.no_grad():
        found = run_pipeline(student.model, student.packs(rows)[:2], last_stage, grid=here.grid, forward_only=True)
    return max(float(value) for value in found)


def _told(figures: dict[str, float | None]) -> str:
    parts = [f"{side} {figures[f'{side}_from_float32_mean']}/{figures[f'{side}_from_float32_max']}" for side in SIDES]
    return (
        f"nats a token, mean/largest difference from float32: {', '.join(parts)}; engine from trainer "
        f"{figures['engine_from_trainer_mean']}/{figures['engine_from_trainer_max']}; output layer alone "
        f"{figures['output_layer_max']}"
    )


def _problems(figures: dict[str, float | None]) -> Sequence[str]:
    problems = []
    if not figures["output_layer_max"] <= OUTPUT_LAYER:
        problems.append(f"the output layer is {figures['output_layer_max']} nats off, above {OUTPUT_LAYER}")
    rounding = min(figures[f"{side}_from_float32_mean"] for side in SIDES)
    most = max(LEAST, APART * rounding)
    for pair in PAIRS:
        apart = figures[f"{pair}_mean"]
        if not apart <= most:
            problems.append(f"{pair}: {apart} nats apart on average, where bfloat16 explains {rounding}")
    return problems
