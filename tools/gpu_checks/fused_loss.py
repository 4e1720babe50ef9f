"""The fused output layer and loss at a real vocabulary: seconds, memory, error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fire_megatron.losses.divergences import build_divergence
from fire_megatron.losses.estimators import SampledLoss, sampled_policy_gradient
from fire_megatron.losses.fused import OutputLayer, TokenLoss, chunked_linear_loss
from fire_megatron.losses.token_losses import DivergenceSettings, Segment, VocabShard, full_loss, sampled_loss
from fire_megatron.platform.device import Device, peak_memory_mb, release_cached_memory, reset_peak_memory, synchronize
from gpu_checks import measure
from gpu_checks.check import Context, Findings, rounded, said
from gpu_checks.models import alone

VALUE, GRADIENT = 1e-3, 2e-2
"""Most that a loss, and a gradient in bfloat16, may be off, as a part of the largest."""


@dataclass(frozen=True)
class Problem:
    """Inputs of a loss. N tokens, H hidden, V vocabulary."""

    hidden_NH: torch.Tensor
    weight_VH: torch.Tensor
    teacher_NH: torch.Tensor
    teacher_VH: torch.Tensor
    target_N: torch.Tensor

    @classmethod
    def draw(cls, tokens: int, hidden: int, vocabulary: int, device: torch.device) -> Problem:
        """Logits of deviation 4; two models that agree in part."""
        draw = torch.Generator(device).manual_seed(0)

        def normal(rows: int, scale: float) -> torch.Tensor:
            return torch.empty(rows, hidden, device=device).normal_(0, scale, generator=draw)

        student, weight = normal(tokens, 1.0), normal(vocabulary, 4 / math.sqrt(hidden))
        teacher = 0.9 * student + 0.3 * normal(tokens, 1.0)
        target = torch.randint(vocabulary, (tokens,), device=device, generator=draw)
        mine, theirs = weight.bfloat16(), weight.roll(1, 1).bfloat16()
        return cls(student.bfloat16(), mine, teacher.roll(1, 1).bfloat16(), theirs, target)

    def first(self, tokens: int) -> Problem:
        """Of so many tokens."""
        parts = (self.hidden_NH[:tokens], self.weight_VH, self.teacher_NH[:tokens], self.teacher_VH)
        return Problem(*parts, self.target_N[:tokens])

    def leaves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and weight whose gradients are wanted."""
        return self.hidden_NH.detach().requires_grad_(), self.weight_VH.detach().requires_grad_()


def _sampled(problem: Problem) -> TokenLoss:
    tokens = len(problem.target_N)
    teacher = torch.full((tokens,), -3.0, device=problem.target_N.device)

    def estimate(log_prob: torch.Tensor, part: slice) -> SampledLoss:
        ones = torch.ones_like(log_prob)
        return sampled_policy_gradient(log_prob, teacher_log_prob=teacher[part], rollout_log_prob=None, weight=ones)

    return sampled_loss(problem.target_N, estimate, shard=VocabShard(None, 0, len(problem.weight_VH)), tokens=tokens)


def _full(problem: Problem) -> TokenLoss:
    tokens, device = len(problem.target_N), problem.target_N.device
    settings = DivergenceSettings(build_divergence("reverse_kl", beta=0.5, skew=0.1))
    segment = Segment([OutputLayer(problem.teacher_VH)], [problem.teacher_NH], torch.ones(tokens, 1, device=device))
    shard = VocabShard(None, 0, len(problem.weight_VH))
    return full_loss([segment], torch.ones(tokens, device=device), settings, shard=shard, tokens=tokens)


def _dense(problem: Problem, estimator: str, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same loss as it is written in PyTorch, in the inputs' dtype; logits at least float32."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logp = torch.log_softmax((hidden @ weight.t()).to(wide), -1)
    if estimator == "full":
        theirs = problem.teacher_NH.to(hidden.dtype) @ problem.teacher_VH.to(hidden.dtype).t()
        return (logp.exp() * (logp - torch.log_softmax(theirs.to(wide), -1))).sum(-1).mean()
    log_prob = logp.gather(1, problem.target_N[:, None])[:, 0]
    advantage = -3.0 - log_prob.detach()
    return (-advantage * (log_prob - log_prob.detach()).exp()).mean()


_LOSSES: dict[str, Callable[[Problem], TokenLoss]] = {"sampled": _sampled, "full": _full}


def fused_loss(context: Context, estimator: str) -> Findings:
    """Args: estimator: ``sampled`` or ``full``."""
    with alone(context) as here:
        return _measured(here.world.device, context, estimator)


def _measured(device: Device, context: Context, estimator: str) -> Findings:
    tokens, hidden, vocabulary = (8192, 2560, 151936) if context.gpu else (256, 64, 1024)
    problem = Problem.draw(tokens, hidden, vocabulary, device.torch_device)
    release_cached_memory(device)
    ours = measure.seconds(lambda: _ours(problem, estimator), device)
    products = measure.seconds(lambda: _products(problem, estimator), device)
    peak = _peak_mb(device, lambda: _ours(problem, estimator))
    dense_peak = _peak_mb(device, lambda: _backward(problem, estimator))
    errors = _errors(problem.first(64), estimator)
    figures = {
        "tokens": tokens,
        "hidden": hidden,
        "vocabulary": vocabulary,
        "seconds": rounded(ours),
        "products_seconds": rounded(products),
        "ratio": rounded(ours / products),
        "peak_mb": peak,
        "full_logits_peak_mb": dense_peak,
        **errors,
    }
    problems = []
    if not errors["value_error"] <= VALUE:
        problems.append(f"the loss is {errors['value_error']} off, above {VALUE}")
    if not max(errors["hidden_gradient_error"], errors["weight_gradient_error"]) <= GRADIENT:
        problems.append(f"a gradient is more than {GRADIENT} off")
    told = (
        f"{tokens} tokens, V {vocabulary}, H {hidden}: {figures['seconds']} s, {figures['ratio']} of the bare products;"
        f" peak {said(peak, 'MB')} against {said(dense_peak, 'MB')} with full logits; off float64 by "
        f"{errors['value_error']} (loss), {errors['hidden_gradient_error']} and "
        f"{errors['weight_gradient_error']} (gradients)"
    )
    return Findings(told, figures, problems)


def _ours(problem: Problem, estimator: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight = problem.leaves()
    loss, _ = chunked_linear_loss(hidden, weight, _LOSSES[estimator](problem))
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def _backward(problem: Problem, estimator: str) -> None:
    hidden, weight = problem.leaves()
    _dense(problem, estimator, hidden, weight).backward()


def _products(problem: Problem, estimator: str) -> None:
    """What cannot be avoided: the logits, the teacher's too where they are compared, and two gradients."""
    for part in range(0, len(problem.target_N), 2048):
        rows = slice(part, part + 2048)
        logits = problem.hidden_NH[rows] @ problem.weight_VH.t()
        if estimator == "full":
            torch.mm(problem.teacher_NH[rows], problem.teacher_VH.t())
        torch.mm(logits, problem.weight_VH)
        torch.mm(logits.t(), problem.hidden_NH[rows])


def _peak_mb(device: Device, action: Callable[[], object]) -> float | None:
    """Of an action, above what was there before; None where it does not fit, and on a CPU, which counts a process's
    peak once and for all."""
    if not device.is_cuda:
        return None
    release_cached_memory(device)
    reset_peak_memory(device)
    before = peak_memory_mb(device)
    try:
        action()
    except torch.OutOfMemoryError:
        return None
    synchronize(device)
    return round(peak_memory_mb(device) - before)


def _errors(problem: Problem, estimator: str) -> dict[str, float | None]:
    """Of loss and gradients, against float64 on the same inputs, as a part of the largest value."""
    found = _ours(problem, estimator)
    leaves = [x.detach().double().requires_grad_() for x in (problem.hidden_NH, problem.weight_VH)]
    loss = _dense(problem, estimator, *leaves)
    loss.backward()
    exact = (loss.detach(), *(leaf.grad for leaf in leaves))
    names = ("value_error", "hidden_gradient_error", "weight_gradient_error")
    return {
        name: rounded(float((ours.double() - right).abs().max() / right.abs().max()))
        for name, ours, right in zip(names, found, exact, strict=True)
    }
