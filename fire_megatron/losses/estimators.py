"""Per-token losses from per-token log-probabilities (the ``sampled`` estimator).

All tensors are elementwise of one shape, [T] or [B, R], float32; nothing here communicates or divides by a count.
Only real response tokens come in: padding has no say in a mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to plus and minus this before exponentiation."""


@dataclass(frozen=True)
class SampledLoss:
    """Per-token loss and what to report of it, all of the inputs' shape."""

    loss: torch.Tensor
    """Carries the gradient."""
    ratio: torch.Tensor
    """Present policy over old policy, no gradient."""
    clipped: torch.Tensor
    """Bool: the clipped branch decides and is flat, so the token has no gradient."""
    importance: torch.Tensor
    """Weight that corrects for sampling with the rollout engine, no gradient."""
    corrected: torch.Tensor
    """Bool: the importance weight was truncated or masked."""
    approx_kl: torch.Tensor
    """Estimate of KL(old || present): old - present log-probability, no gradient."""


def importance_weights(
    old_log_prob: torch.Tensor, rollout_log_prob: torch.Tensor, *, mode: str, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Trainer over rollout engine: pi_old / pi_rollout, bounded.

    Args:
        old_log_prob: the trainer's log-probabilities of the sampled tokens, before any update on them.
        rollout_log_prob: those with which the engine sampled.
        mode: ``truncate`` (min with ``high``: truncated importance sampling, Ionides 2008), ``mask`` (0 outside
            [low, high]) or ``off`` (1).
        low: lower bound, ``mask`` only.
        high: upper bound.

    Returns:
        Weights and whether each was cut, both without gradient.
    """
    if mode == "off":
        return torch.ones_like(old_log_prob), torch.zeros_like(old_log_prob, dtype=torch.bool)
    ratio = (old_log_prob - rollout_log_prob).detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    if mode == "truncate":
        return ratio.clamp_max(high), ratio > high
    assert mode == "mask", mode
    outside = (ratio < low) | (ratio > high)
    return ratio.masked_fill(outside, 0.0), outside


def sampled_policy_gradient(
    log_prob: torch.Tensor,
    *,
    teacher_log_prob: torch.Tensor,
    rollout_log_prob: torch.Tensor | None,
    weight: torch.Tensor,
    old_log_prob: torch.Tensor | None = None,
    clip: float = 0.2,
    importance_mode: str = "truncate",
    importance_low: float = 0.0,
    importance_high: float = 2.0,
) -> SampledLoss:
    """Clipped policy gradient on the weighted advantage log p_T - log p_S,old (FiRe-OPD, arXiv 2606.02684; the
    clipping is PPO's, arXiv 1707.06347 eq. 7).

        A = weight * (teacher - old),  r = exp(clamp(log_prob - old, -20, 20)),
        loss = importance * max(-A r, -A clamp(r, 1 - clip, 1 + clip))

    Args:
        log_prob: the student's log-probabilities under the present weights; the only input with a gradient.
        teacher_log_prob: the teacher's, of the same tokens.
        rollout_log_prob: those with which the rollout engine sampled; None for no correction.
        weight: FiRe's token weights.
        old_log_prob: the student's at the time of the rollouts; None when no update has been made since, so that
            they are ``log_prob`` itself and the ratio is exactly 1.
        clip: PPO's epsilon.
        importance_mode, importance_low, importance_high: see :func:`importance_weights`.
    """
    present = log_prob.detach()
    old = present if old_log_prob is None else old_log_prob.detach()
    advantage = weight.detach() * (teacher_log_prob.detach() - old)
    ratio = (log_prob - old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    plain, bounded = -advantage * ratio, -advantage * ratio.clamp(1.0 - clip, 1.0 + clip)
    mode = "off" if rollout_log_prob is None else importance_mode
    importance, corrected = importance_weights(
        old, old if rollout_log_prob is None else rollout_log_prob, mode=mode, low=importance_low, high=importance_high
    )
    return SampledLoss(
        loss=importance * torch.maximum(plain, bounded),
        ratio=ratio.detach(),
        clipped=(bounded > plain).detach(),
        importance=importance,
        corrected=corrected,
        approx_kl=old - present,
    )
