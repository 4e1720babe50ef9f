"""Everything that makes a value a token of logits, beside its definition: what the tests of all of them share."""

from __future__ import annotations

from dataclasses import dataclass, replace

import dense
import torch
from dense import KINDS, overwritten, value_and_gradient

from fire_megatron.losses.divergences import build_divergence
from fire_megatron.losses.topk import TopK, top_k, topk_divergence
from fire_megatron.losses.vocab_divergence import divergence
from fire_megatron.losses.vocab_parallel import log_prob_and_entropy

EXACT = {torch.float32: dict(rtol=1e-5, atol=2e-6), torch.float64: dict(rtol=1e-12, atol=1e-13)}


@dataclass(frozen=True)
class Loss:
    """Of the student's logits and the teacher's; ``log_prob`` is that of the teacher's likeliest token and 0.3 of the
    entropy."""

    kind: str
    """A divergence, or ``log_prob``."""
    listed: int = 0
    """Tokens of the teacher's top-k; 0 is the divergence over the whole vocabulary."""

    def __str__(self) -> str:
        return f"{self.kind} of {self.listed}" if self.listed else self.kind

    def list(self, teacher: torch.Tensor, temperature: float = 1.0) -> TopK:
        """Of the whole vocabulary."""
        k = min(self.listed, teacher.shape[-1])
        return top_k(teacher, k, group=None, vocab_start=0, temperature=temperature)

    @property
    def of_shards(self) -> bool:
        """Whether each rank needs its shard of the teacher's logits, and not all of them."""
        return not self.listed and self.kind != "log_prob"

    def ours(self, teacher, *, temperatures=(1.0, 1.0), group=None, vocab_start=0, found=None, **options):
        """Function of the student's logits.

        Args:
            teacher: logits, of this shard or of the whole vocabulary: see :attr:`of_shards`.
            temperatures: the student's and the teacher's.
            found: the teacher's top-k, if it is there already.
        """
        shard = {"group": group, "vocab_start": vocab_start}
        if self.kind == "log_prob":
            target = teacher.argmax(-1)

            def function(logits):
                log_prob, entropy = log_prob_and_entropy(logits, target, **shard, **options)
                return log_prob + 0.3 * entropy

            return function
        kind = build_divergence(self.kind, **KINDS[self.kind])
        options["temperature"] = temperatures[0]
        if not self.listed:
            options["teacher_temperature"] = temperatures[1]
            return lambda logits: divergence(logits, teacher, kind=kind, group=group, **options)
        found = found or self.list(teacher, temperatures[1])
        return lambda logits: topk_divergence(logits, found, kind=kind, **shard, **options)

    def dense(self, teacher, *, temperatures=(1.0, 1.0), found=None):
        """The same by its definition, in float64."""
        log_t = dense.log_softmax(teacher, temperatures[1])
        if self.listed:
            found = found or self.list(teacher, temperatures[1])
            log_t = torch.cat((found.log_prob_TK, found.tail_log_prob_T[:, None]), -1).double()

        def function(logits):
            log_s = dense.log_softmax(logits, temperatures[0])
            if self.kind == "log_prob":
                entropy = -(log_s.exp() * log_s.clamp_min(-1e300)).sum(-1)
                return log_s.gather(-1, teacher.argmax(-1)[:, None]).squeeze(-1) + 0.3 * entropy
            if self.listed:
                log_s = dense.buckets(log_s, found.ids_TK)
            return dense.divergence(self.kind, log_s, log_t, **KINDS[self.kind])

        return function

    def of_sizes(self, vocabulary: int) -> list[Loss]:
        """With lists of some lengths up to the whole vocabulary, where there are lists."""
        sizes = sorted({1, min(7, vocabulary), vocabulary // 2 or 1, vocabulary}) if self.listed else [0]
        return [replace(self, listed=size) for size in sizes]


DIVERGENCES = [Loss(kind, listed) for listed in (0, 7) for kind in KINDS]
LOSSES = [*DIVERGENCES, Loss("log_prob")]


def draw(tokens, vocabulary, dtype=torch.float32, models=2, scale=3.0):
    """Logits of the student and its teachers, and output gradients."""
    generator = torch.Generator().manual_seed(tokens * 1000 + vocabulary)
    logits = torch.randn(models, tokens, vocabulary, generator=generator, dtype=torch.float64) * scale
    return (*logits.to(dtype).unbind(), torch.randn(tokens, generator=generator, dtype=torch.float64))


def draw_weights(tokens, teachers):
    """Different at every token; the first tokens have one teacher alone."""
    generator = torch.Generator().manual_seed(tokens + teachers)
    weights = torch.rand(tokens, teachers, generator=generator).add_(0.05)
    weights /= weights.sum(-1, keepdim=True)
    weights[:teachers] = torch.eye(teachers)[:tokens]
    return weights


def run(function, logits, grad, reuse=False):
    """Value and gradient; ``reuse``: of a function that writes the gradient over the logits."""
    return (overwritten if reuse else value_and_gradient)(function, logits, grad)


def same(ours, expected, dtype=torch.float32):
    """Value and gradient."""
    for value, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(value.double(), other.double(), **EXACT[dtype])
