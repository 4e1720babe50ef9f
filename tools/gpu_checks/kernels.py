"""The Triton kernels against the plain torch that they stand for, at real sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

import fire_megatron.kernels
from fire_megatron.losses.vocab_parallel import log_prob_and_entropy
from fire_megatron.models.layers import SwiGLU
from fire_megatron.models.rotary import rotate
from fire_megatron.platform.graphs import Graphs
from fire_megatron.rollout.sampler import sample_tokens, uniforms
from gpu_checks import measure
from gpu_checks.check import Context, Findings, rounded
from gpu_checks.models import Here, alone, ragged

_CALLS = 20
"""In one CUDA graph, of what is short."""
ATTENTIONS = {"attention_32": (32, 64, 512), "attention_256": (256, 64, 512), "attention_long": (32, 1024, 8192)}
"""Rows, tokens of the shortest and of the longest."""
NAMES = ("rotary", "swiglu", "log_prob", "sampling", *ATTENTIONS)


@contextlib.contextmanager
def _without() -> Iterator[None]:
    """Plain torch."""
    usable, fire_megatron.kernels.usable = fire_megatron.kernels.usable, lambda _: False
    try:
        yield
    finally:
        fire_megatron.kernels.usable = usable


def kernels(context: Context) -> Findings:
    """Microseconds of each, and as a part of plain torch's; of attention also gigabytes of cache a second."""
    figures: dict[str, float | None] = {}
    with alone(context) as here, torch.no_grad():
        for name, call in _calls(here):
            ours = _seconds(here, call)
            with _without():
                plain = _seconds(here, call)
            figures |= {f"{name}_us": rounded(1e6 * ours), f"{name}_to_torch": rounded(ours / plain)}
        for name, (rows, shortest, longest) in ATTENTIONS.items():
            figures |= _attention(here, name, rows, shortest, longest)
    told = "; ".join(f"{name} {figures[f'{name}_us']} us, {figures[f'{name}_to_torch']} of torch's" for name in NAMES)
    speeds = ", ".join(str(figures[f"{name}_gb_s"]) for name in ATTENTIONS)
    return Findings(f"{told}; attention reads {speeds} GB/s", figures)


def _seconds(here: Here, call: Callable[[], object]) -> float:
    """Of one call, many of which are one CUDA graph, so that the host is not in the way."""
    graphs = Graphs(here.context.gpu)

    def many() -> None:
        for _ in range(_CALLS):
            call()

    graphs.run("calls", many)
    return measure.seconds(lambda: graphs.run("calls", many), here.world.device) / _CALLS


def _calls(here: Here) -> Iterator[tuple[str, Callable[[], object]]]:
    device, half = here.world.device.torch_device, torch.bfloat16
    tokens = 8192
    query = torch.randn(tokens, 32, 128, device=device, dtype=half)
    angles = torch.randn(tokens, 1, 64, device=device).repeat(1, 1, 2)
    rotary = angles.cos().to(half), angles.sin().to(half)
    yield "rotary", lambda: rotate(query, rotary)
    both = torch.randn(tokens, 2 * 9728, device=device, dtype=half)
    yield "swiglu", lambda: SwiGLU.apply(both)
    logits = 4 * torch.randn(256, 151936, device=device)
    target = torch.arange(256, device=device)

    def log_prob() -> None:
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            log_p, entropy = log_prob_and_entropy(leaf, target, group=None, vocab_start=0)
            torch.autograd.grad(log_p.sum() + entropy.sum(), leaf)

    yield "log_prob", log_prob
    numbers, group = uniforms(0, 0, range(256), 0).to(device), here.grid.pg.tp
    yield "sampling", lambda: sample_tokens(logits, numbers, temperature=1.0, top_p=1.0, vocab_start=0, group=group)


def _attention(here: Here, name: str, rows: int, shortest: int, longest: int) -> dict[str, float | None]:
    """Heads of a Qwen3-4B; against scaled_dot_product_attention with a mask over all positions."""
    from fire_megatron.kernels.decode_attention import decode_attention

    device, half = here.world.device.torch_device, torch.bfloat16
    lengths = torch.tensor(ragged(rows, shortest, longest), device=device)
    keys, values = torch.randn(2, rows, 8, longest, 128, device=device, dtype=half).unbind()
    query = torch.randn(rows, 32, 128, device=device, dtype=half)
    seen = torch.arange(longest, device=device) < lengths[:, None]
    mask = torch.zeros(seen.shape, dtype=half, device=device).masked_fill_(~seen, -torch.inf)[:, None, None]
    grouped, scale = query.view(rows, 8, 4, 128), 128**-0.5
    ours = _seconds(here, lambda: decode_attention(query, keys, values, lengths - 1, window=None, scale=scale))
    plain = _seconds(here, lambda: F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale))
    read = 2 * 8 * 128 * 2 * int(lengths.sum())
    return {
        f"{name}_us": rounded(1e6 * ours),
        f"{name}_to_torch": rounded(ours / plain),
        f"{name}_gb_s": rounded(read / ours / 1e9),
    }
