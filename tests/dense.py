"""Dense float64 references of the divergences, straight from their definitions, differentiated by autograd."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


def value_and_gradient(function, logits: torch.Tensor, grad_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[T] values of ``function(logits)`` and the gradient of the logits, which it must leave as they are."""
    logits = logits.detach().clone().requires_grad_()
    before = logits.detach().clone()
    value_T = function(logits)
    value_T.backward(grad_T.to(value_T.dtype))
    assert torch.equal(logits.detach().nan_to_num(nan=7), before.nan_to_num(nan=7))
    return value_T.detach(), logits.grad


def overwritten(function, logits: torch.Tensor, grad_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`value_and_gradient`, for a function that writes the gradient over the logits."""
    ours = logits.detach().clone().requires_grad_() * 1.0  # what a layer returns, which no one else needs
    memory = ours.data_ptr()
    value_T = function(ours)
    (gradient,) = torch.autograd.grad(value_T, ours, grad_T.to(value_T.dtype))
    assert gradient.data_ptr() == memory and torch.equal(ours.detach().nan_to_num(nan=7), gradient.nan_to_num(nan=7))
    return value_T.detach(), gradient


class Allocations(TorchDispatchMode):
    """Sizes, in elements, of all results that are no views of an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        def storages(tree) -> set[int]:
            return {x.untyped_storage().data_ptr() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)}

        result = function(*args, **(kwargs or {}))
        given = storages((args, kwargs))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not storages(tensor) <= given:
                self.sizes.append(tensor.numel())
        return result
