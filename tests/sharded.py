"""A vocabulary in shards: layouts of it, logits, and what of a sharded loss equals the unsharded one."""

import pytest
import torch
import torch.distributed as dist
from dense import KINDS
from token_losses import LOSSES

from fire_megatron.losses.divergences import build_divergence
from fire_megatron.losses.vocab_divergence import divergence

VOCABULARY, REAL = 96, 6
LAYOUTS = ["even", "padded", "cut", "uneven"]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=str)


def borders(layout, size):
    """Where the shards of a layout begin, and the end. Of what is padded or cut, whole shards have no real column."""
    if layout == "uneven":
        return [0, 1, 96] if size == 2 else [0, 1, 1, 60, 96]
    even = [VOCABULARY * rank // size for rank in range(size + 1)]
    return [min(border, REAL) for border in even] if layout == "cut" else even


def shard(logits, layout, group):
    """This rank's columns and the first one's id."""
    start, stop = borders(layout, group.size())[group.rank() :][:2]
    return logits[:, start:stop], start


def draw(tokens, layout="even", dtype=torch.float32, models=2, scale=3.0):
    """The same on every rank: logits of the student and its teachers, and output gradients."""
    generator = torch.Generator().manual_seed(tokens)
    logits = torch.randn(models, tokens, VOCABULARY, generator=generator).mul_(scale).to(dtype)
    if layout == "cut":
        logits = logits[..., :REAL]
    elif layout == "padded":
        logits[..., REAL:] = -torch.inf
    return (*logits.unbind(), torch.randn(tokens, generator=generator))


def of(kind, teachers, group=None, **options):
    """A divergence over the vocabulary from one or several teachers."""
    built = build_divergence(kind, **KINDS[kind])
    return lambda logits: divergence(logits, teachers, kind=built, group=group, **options)


def sharded(loss, teacher, layout, group, **options):
    """The loss over this rank's shard, of the whole teacher."""
    mine, start = shard(teacher, layout, group)
    return loss.ours(mine if loss.of_shards else teacher, group=group, vocab_start=start, **options)


def same_on_all_ranks(values, group):
    gathered = [torch.empty_like(values) for _ in range(group.size())]
    dist.all_gather(gathered, values.contiguous(), group=group)
    return all(torch.equal(value, values) for value in gathered)


def same(ours, whole, layout, group, roundings=1):
    """Values on all ranks and this shard of the gradient, against those of the whole vocabulary in float64."""
    assert same_on_all_ranks(ours[0], group)
    exact, rounding = 1e-12, 1e-12
    if ours[1].dtype is not torch.float64:
        exact, rounding = 1e-5, max(1e-5, torch.finfo(ours[1].dtype).eps) * roundings
    # A gradient is the difference of two terms of the size of the value.
    close = 0.2 * exact * max(1, whole[0].max().item() / 10)
    torch.testing.assert_close(ours[0].double(), whole[0], rtol=exact, atol=0.2 * exact)
    torch.testing.assert_close(ours[1].double(), shard(whole[1], layout, group)[0], rtol=rounding, atol=close)
