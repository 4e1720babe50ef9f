"""The update of the student: tokens a second, share of the card's peak, bfloat16 against FP8."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fire_megatron.config.hf_config import ModelShape
from fire_megatron.config.loss import LossConfig
from fire_megatron.config.schema import FP8Config, OptimizerConfig, PrecisionConfig
from fire_megatron.data.rollouts import Rollouts
from fire_megatron.platform.device import peak_memory_mb, release_cached_memory, reset_peak_memory
from fire_megatron.train.student import Student
from gpu_checks import measure
from gpu_checks.agreement import as_training_rows
from gpu_checks.check import Context, Findings, rounded, said
from gpu_checks.commands import need_fp8
from gpu_checks.models import alone, prompts_of


@dataclass(frozen=True)
class Sizes:
    """Of a step."""

    model: str
    rows: int
    prompt: int
    response: int
    micro_batch_tokens: int

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.rows * (self.prompt + self.response)


def sizes(context: Context) -> Sizes:
    """What is trained on."""
    return Sizes("Qwen3-1.7B", 32, 128, 896, 8192) if context.gpu else Sizes("toy", 4, 8, 24, 64)


def training_step(context: Context, fp8: str | None = None) -> Findings:
    """Gradients of a step's rows, and the optimizer. Args: fp8: recipe; None is bfloat16."""
    size, precision = sizes(context), PrecisionConfig("bfloat16", fp8 and FP8Config(recipe=fp8))
    with alone(context) as here:
        if fp8:
            need_fp8(context, fp8)
        device = here.world.device
        peak = measure.peak_tflops(device)
        release_cached_memory(device)
        reset_peak_memory(device)
        model = here.model(size.model, dtype="bfloat16", fp8=precision.fp8)
        optimizer = OptimizerConfig(micro_batch_tokens=size.micro_batch_tokens)
        student = Student(model, here.grid, loss=LossConfig(), optimizer=optimizer, precision=precision)
        rows = as_training_rows(random_rollouts(size, model.used_vocab_size))
        losses, norms = [], []

        def step() -> None:
            report = student.accumulate_gradients(rows, tokens=size.rows * size.response)
            losses.append(float(report["loss"].result))
            norms.append(student.update()["grad_norm"].result)

        times = 2 if context.gpu else 1
        spent = measure.seconds(step, device, times=times)
        gradients = measure.seconds(lambda: student.accumulate_gradients(rows, tokens=1.0), device, times=1, first=True)
        flops = training_flops(here.shape(size.model), size)
        memory = round(peak_memory_mb(device)) if context.gpu else None
    figures = {
        "tokens": size.tokens,
        "seconds": rounded(spent),
        "gradient_seconds": rounded(gradients),
        "optimizer_seconds": rounded(max(spent - gradients, 0.0)),
        "tokens_per_second": rounded(size.tokens / spent),
        "model_tflops": rounded(flops / spent / 1e12),
        "of_peak": rounded(flops / spent / 1e12 / peak),
        "peak_mb": memory,
        "loss": rounded(losses[0], 5),
        "grad_norm": rounded(norms[0], 5),
    }
    return _judged(figures, context.earlier("training_step") if fp8 else {})


def _judged(figures: dict[str, float | None], bf16: dict[str, float | None]) -> Findings:
    problems = [] if all(math.isfinite(figures[key]) for key in ("loss", "grad_norm")) else ["it is not finite"]
    figures["seconds_to_bf16"] = rounded(figures["seconds"] / bf16["seconds"]) if bf16 else None
    told = (
        f"{figures['tokens']} tokens in {figures['seconds']} s, {figures['tokens_per_second']} tokens/s; "
        f"{figures['of_peak']} of the bf16 peak measured here; peak {said(figures['peak_mb'], 'MB')}; gradient norm "
        f"{figures['grad_norm']}"
    )
    if bf16:
        told += f"; {figures['seconds_to_bf16']} of bfloat16's seconds, whose norm is {bf16['grad_norm']}"
    return Findings(told, figures, problems)


def random_rollouts(size: Sizes, vocabulary: int) -> Rollouts:
    """Random answers of one length."""
    draw = torch.Generator().manual_seed(1)
    responses = tuple(torch.randint(vocabulary, (size.response,), generator=draw) for _ in range(size.rows))
    values = torch.full((size.response,), -math.log(vocabulary))
    return Rollouts(
        row_ids=tuple(range(size.rows)),
        prompts=tuple(prompts_of([size.prompt] * size.rows, vocabulary)),
        responses=responses,
        log_probs=(values,) * size.rows,
        entropies=(-values,) * size.rows,
        truncated=(True,) * size.rows,
        weight_version=0,
    )


def training_flops(shape: ModelShape, size: Sizes) -> float:
    """Of the model, forward and backward: two a weight and token, twice that backward; causal attention at half."""
    heads = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim
    layer = shape.hidden * (heads + 3 * shape.ffn)
    length = size.prompt + size.response
    attention = 2 * shape.heads * shape.head_dim * length  # scores and their sum, of half of the positions
    output = shape.hidden * shape.vocab_size * size.rows * size.response
    return 6 * (size.tokens * shape.num_layers * layer + output) + 3 * size.tokens * shape.num_layers * attention
