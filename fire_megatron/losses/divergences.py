"""The divergences between two next-token distributions, as sums over a vocabulary.

Every one has the form D = sum_v f(s_v, t_v) with s the student's and t the teacher's probabilities. With
h_v = s_v * df/ds_v, its gradient with respect to the student's logits is

    dD / dz_v = h_v - s_v * sum_u h_u

so a divergence is given by f and h alone, and a shard of the vocabulary contributes two sums: of f and of h. A term
of h that is constant times s cancels in that gradient and is left out.

Shapes: C tokens, V columns of this shard. ``tiny`` is the smallest normal number of the dtype: where a mixture m is
below it, s and t are too, and what multiplies log m or 1 / m is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch


class Terms(NamedTuple):
    """What one shard contributes."""

    value_C: torch.Tensor
    """Sum of f over the columns."""
    inner_C: torch.Tensor
    """Sum of h over the columns."""
    h_CV: torch.Tensor
    """h itself; may share memory with an argument."""


@dataclass(frozen=True)
class Divergence:
    """One divergence with its parameter filled in."""

    name: str
    terms: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], Terms]
    """``(log_s_CV, s_CV, log_t_CV, t_CV) -> Terms``. Overwrites all of them but ``s_CV``; logs are finite, at most a
    rounding above 0."""
    reads_t: bool = True
    """Whether ``t_CV`` is read; otherwise it may be None."""
    parameter: float = 0.0
    """Its beta or skew."""


def _reverse_kl(log_s: torch.Tensor, s: torch.Tensor, log_t: torch.Tensor, t: torch.Tensor | None) -> Terms:
    """KL(s || t): f = s (log s - log t), h = f."""
    h = log_s.sub_(log_t).mul_(s)
    value = h.sum(-1)
    return Terms(value, value, h)


def _forward_kl(log_s: torch.Tensor, s: torch.Tensor, log_t: torch.Tensor, t: torch.Tensor) -> Terms:
    """KL(t || s): f = t (log t - log s), h = -t."""
    value = log_t.sub_(log_s).mul_(t).sum(-1)
    h = t.neg_()
    return Terms(value, h.sum(-1), h)


def _jensen_shannon(beta: float, log_s: torch.Tensor, s: torch.Tensor, log_t: torch.Tensor, t: torch.Tensor) -> Terms:
    """beta KL(t || m) + (1 - beta) KL(s || m) with m = beta t + (1 - beta) s: h = (1 - beta) s (log s - log m)."""
    log_m = torch.lerp(s, t, beta).clamp_min_(torch.finfo(s.dtype).tiny).log_()
    of_t = log_t.sub_(log_m).mul_(t).sum(-1)
    h = log_s.sub_(log_m).mul_(s).mul_(1 - beta)
    inner = h.sum(-1)
    return Terms(beta * of_t + inner, inner, h)


def _skewed_forward_kl(
    skew: float, log_s: torch.Tensor, s: torch.Tensor, log_t: torch.Tensor, t: torch.Tensor
) -> Terms:
    """KL(t || m) with m = skew t + (1 - skew) s: h = -(1 - skew) s t / m."""
    m = torch.lerp(s, t, skew).clamp_min_(torch.finfo(s.dtype).tiny)
    h = torch.mul(s, t).div_(m).mul_(skew - 1)
    value = log_t.sub_(m.log_()).mul_(t).sum(-1)
    return Terms(value, h.sum(-1), h)


def _skewed_reverse_kl(
    skew: float, log_s: torch.Tensor, s: torch.Tensor, log_t: torch.Tensor, t: torch.Tensor
) -> Terms:
    """KL(s || m) with m = skew s + (1 - skew) t: h = s (log s - log m) - skew s^2 / m."""
    m = torch.lerp(t, s, skew).clamp_min_(torch.finfo(s.dtype).tiny)
    of_m = torch.square(s).div_(m).mul_(skew)
    f = log_s.sub_(m.log_()).mul_(s)
    value = f.sum(-1)
    h = f.sub_(of_m)
    return Terms(value, h.sum(-1), h)


def build_divergence(name: str, *, beta: float = 0.5, skew: float = 0.1) -> Divergence:
    """A divergence by its recipe name.

    Args:
        name: ``reverse_kl``, ``forward_kl``, ``jensen_shannon`` (generalised: GKD, arXiv 2306.13649, eq. 1, with P the
            teacher and Q the student), ``skewed_forward_kl`` or ``skewed_reverse_kl`` (DistiLLM, arXiv 2402.03898,
            eq. 4 and 5).
        beta: weight of the teacher in the mixture of ``jensen_shannon``, in (0, 1).
        skew: alpha of the skewed divergences, in (0, 1): how much of its first argument the second is mixed with.
    """
    if name == "reverse_kl":
        return Divergence(name, _reverse_kl, reads_t=False)
    if name == "forward_kl":
        return Divergence(name, _forward_kl)
    function, parameter = {
        "jensen_shannon": (_jensen_shannon, beta),
        "skewed_forward_kl": (_skewed_forward_kl, skew),
        "skewed_reverse_kl": (_skewed_reverse_kl, skew),
    }[name]
    assert 0 < parameter < 1, (name, parameter)
    return Divergence(name, partial(function, parameter), parameter=parameter)
