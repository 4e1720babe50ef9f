"""Dense float64 references of the divergences, straight from their definitions, differentiated by autograd."""

from __future__ import annotations

import torch

KINDS = {
    "reverse_kl": {},
    "forward_kl": {},
    "jensen_shannon": {"beta": 0.3},
    "skewed_forward_kl": {"skew": 0.1},
    "skewed_reverse_kl": {"skew": 0.2},
}
"""Every divergence, with the parameters that the tests give it."""


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Sum of p (log p - log q) over the last dimension; 0 where p is."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)


def mix(log_p: torch.Tensor, log_q: torch.Tensor, weight: float) -> torch.Tensor:
    """log of weight p + (1 - weight) q."""
    first = torch.tensor(weight, dtype=log_p.dtype)
    return torch.logaddexp(log_p + first.log(), log_q + (1 - first).log())


def divergence(name: str, log_s: torch.Tensor, log_t: torch.Tensor, *, beta: float = 0.5, skew: float = 0.1):
    """[T] divergence from log-probabilities [T, V] of the student and the teacher."""
    if name == "reverse_kl":
        return kl(log_s, log_t)
    if name == "forward_kl":
        return kl(log_t, log_s)
    if name == "jensen_shannon":
        log_m = mix(log_t, log_s, beta)
        return beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m)
    if name == "skewed_forward_kl":
        return kl(log_t, mix(log_t, log_s, skew))
    assert name == "skewed_reverse_kl"
    return kl(log_s, mix(log_s, log_t, skew))


def log_softmax(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """float64 log-softmax; columns of ``-inf`` must be cut away first."""
    return torch.log_softmax(logits.double() / temperature, -1)


def mixture(logits: list[torch.Tensor], weights: torch.Tensor, how: str, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of a mixture of several teachers' distributions; weights [T, K]."""
    logs = torch.stack([log_softmax(x, temperature) for x in logits])
    weights = weights.double().t()[:, :, None]
    if how == "distributions":
        return torch.logsumexp(logs + weights.log(), 0)
    return torch.log_softmax((logs * weights).sum(0), -1)


def buckets(log_p: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[T, V] log-probabilities -> [T, K + 1] of the listed tokens and of all others together."""
    listed = log_p.gather(-1, ids)
    rest = log_p.scatter(-1, ids, -torch.inf)
    tail = torch.logsumexp(rest, -1, keepdim=True) if ids.shape[-1] < log_p.shape[-1] else rest[:, :1]
    return torch.cat((listed, tail.nan_to_num(nan=-1e300, neginf=-1e300)), -1)
