"""A teacher that scores answers: tokens a second, share of the card's peak."""

from __future__ import annotations

from fire_megatron.platform.device import peak_memory_mb, release_cached_memory, reset_peak_memory
from fire_megatron.teachers.teacher import Teacher
from gpu_checks import measure
from gpu_checks.check import Context, Findings, rounded, said
from gpu_checks.models import alone
from gpu_checks.training import Sizes, random_rollouts, training_flops


def scoring(context: Context) -> Findings:
    """Log-probabilities and entropies of answers of one length."""
    size = Sizes("Qwen3-4B", 32, 128, 896, 16384) if context.gpu else Sizes("toy", 4, 8, 24, 64)
    with alone(context) as here:
        device = here.world.device
        peak = measure.peak_tflops(device)
        release_cached_memory(device)
        reset_peak_memory(device)
        model, shape = here.model(size.model, dtype=here.dtype), here.shape(size.model)
        teacher = Teacher(model, here.grid, micro_batch_tokens=size.micro_batch_tokens)
        rollouts = random_rollouts(size, shape.vocab_size)
        texts = (rollouts.prompt_tokens, rollouts.responses)
        spent = measure.seconds(lambda: teacher.score(*texts), device, times=2 if context.gpu else 1)
        memory = round(peak_memory_mb(device)) if context.gpu else None
    tflops = training_flops(shape, size) / 3 / spent / 1e12  # forward alone
    figures = {
        "tokens": size.tokens,
        "seconds": rounded(spent),
        "tokens_per_second": rounded(size.tokens / spent),
        "model_tflops": rounded(tflops),
        "of_peak": rounded(tflops / peak),
        "peak_mb": memory,
    }
    told = (
        f"{size.tokens} tokens in {figures['seconds']} s, {figures['tokens_per_second']} tokens/s; "
        f"{figures['of_peak']} of the bf16 peak measured here; peak {said(memory, 'MB')}"
    )
    return Findings(told, figures)
