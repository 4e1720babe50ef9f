"""Each Triton kernel against float64, forward and backward: in Triton's interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import dense
import pytest
import torch

from fire_megatron import kernels
from fire_megatron.losses.divergences import build_divergence
from fire_megatron.losses.vocab_divergence import divergence
from fire_megatron.losses.vocab_parallel import log_prob_and_entropy
from fire_megatron.models.layers import SwiGLU
from fire_megatron.models.rotary import rotate
from fire_megatron.rollout import sampler

EXACT = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""How far a result of some units may be from float64: two roundings of its format."""


class Alone:
    """A group of one rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def draw(*shape: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def _forward_and_backward(monkeypatch, function, x: torch.Tensor, upstream: torch.Tensor, kernel: bool):
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "usable", lambda _: kernel)
        x = x.detach().requires_grad_()
        y = function(x)
        return y, torch.autograd.grad(y, x, upstream.to(y.dtype))[0]


def _check(monkeypatch, function, exact, x: torch.Tensor, *shape: int) -> None:
    """A function and its gradient: by a kernel and by plain torch against autograd of ``exact`` in float64."""
    upstream = draw(*shape, device=str(x.device), dtype=x.dtype, seed=2)
    wanted = _forward_and_backward(monkeypatch, exact, x.double(), upstream, False)
    for kernel in (True, False):
        found = _forward_and_backward(monkeypatch, function, x, upstream, kernel)
        for got, want in zip(found, wanted, strict=True):
            assert got.dtype == x.dtype
            torch.testing.assert_close(got.double(), want, atol=EXACT[x.dtype], rtol=EXACT[x.dtype])


def check_rotation(monkeypatch, device: str, dtype: torch.dtype, *, tokens: int, heads: int, size: int) -> None:
    """Of a slice of a wider tensor, as heads come out of the projection of queries, keys and values."""
    x = draw(tokens, heads + 2, size + 8, device=device, dtype=dtype)[:, 1:-1, :size]
    angles = draw(tokens, 1, size // 2, device=device, seed=1).repeat(1, 1, 2)
    rotary = angles.cos().to(dtype), angles.sin().to(dtype)

    def exact(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * rotary[0].double() + torch.cat((-second, first), -1) * rotary[1].double()

    _check(monkeypatch, lambda x: rotate(x, rotary), exact, x, tokens, heads, size)


def check_swiglu(monkeypatch, device: str, dtype: torch.dtype, *, tokens: int, columns: int) -> None:
    """Also where gates are large."""
    x = 3 * draw(tokens, 1, 2 * columns, device=device, dtype=dtype)

    def exact(both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, -1)
        return gate * gate.sigmoid() * up

    _check(monkeypatch, SwiGLU.apply, exact, x, tokens, 1, columns)


def check_attention(
    monkeypatch,
    device: str,
    dtype: torch.dtype,
    *,
    heads: int,
    kv_heads: int,
    size: int,
    positions: int,
    window: int | None,
) -> int:
    """Rows from one token to all positions; the rest of their slots holds numbers that must not be read.

    Returns:
        Parts that the rows were cut into.
    """
    from fire_megatron.kernels.decode_attention import append, decode_attention, parts_of

    lengths = [1, positions // 3, positions - 1, positions]
    rows = len(lengths)
    at = torch.tensor(lengths, device=device) - 1
    memory = draw(2, rows + 1, kv_heads, positions + 32, size, device=device, dtype=dtype)
    for row, length in enumerate(lengths):
        memory[:, row, :, length - 1 :] = math.nan
    fused = draw(rows, heads + 2 * kv_heads, size, device=device, dtype=dtype, seed=1)
    query, key, value = fused.split((heads, kv_heads, kv_heads), 1)
    append(memory[0], memory[1], key, value, at)
    keys, values = memory[:, :rows, :, :positions]
    ours = decode_attention(query, keys, values, at, window=window, scale=size**-0.5)
    assert ours.dtype == dtype and ours.shape == (rows, heads, size)
    for row, length in enumerate(lengths):
        seen = slice(max(0, length - (window or length)), length)
        k, v = (t[row, :, seen].double().repeat_interleave(heads // kv_heads, 0) for t in (keys, values))
        scores = torch.einsum("hd,hld->hl", query[row].double(), k) * size**-0.5
        exact = torch.einsum("hl,hld->hd", scores.softmax(-1), v)
        torch.testing.assert_close(ours[row].double(), exact, atol=EXACT[dtype], rtol=EXACT[dtype])
        assert torch.equal(keys[row, :, length - 1], key[row]) and torch.equal(values[row, :, length - 1], value[row])
    return parts_of(rows, kv_heads, positions)


def check_log_prob_and_entropy(
    monkeypatch, device: str, dtype: torch.dtype, *, tokens: int, columns: int, entropy: bool, reuse: bool
) -> None:
    """Large logits, padding columns, targets of which one is elsewhere."""
    logits = (8 * draw(tokens, columns, device=device) + 20).to(dtype)
    logits[:, columns - 2 :] = -torch.inf
    target = torch.arange(tokens, device=device) % (columns - 2) + 5
    target[0] = 2  # before this shard's first
    upstream = draw(2, tokens, device=device, seed=1)
    results = []
    for kernel, values in ((True, logits), (False, logits.double())):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "usable", lambda _, kernel=kernel: kernel)
            leaf = values.clone().requires_grad_()
            log_p, h = log_prob_and_entropy(
                leaf * 1, target, group=None, vocab_start=5, with_entropy=entropy, reuse_logits=reuse
            )
            assert log_p[0].isnan(), "nobody holds it"
            outputs = [log_p[1:], *([h[1:]] if entropy else [])]
            grads = [upstream[i, 1:].to(x) for i, x in enumerate(outputs)]
            (gradient,) = torch.autograd.grad(outputs, leaf, grads)
            results.append([*outputs, gradient[1:]])
    assert results[0][-1].dtype == dtype
    for got, want in zip(*results, strict=True):
        limit = EXACT[dtype if got is results[0][-1] else torch.float32]
        torch.testing.assert_close(got.double(), want.double(), atol=10 * limit, rtol=limit)


def check_divergence(
    monkeypatch, device: str, dtype: torch.dtype, *, kind: str, columns: int, reuse: bool, temperatures=(1.0, 1.0)
) -> None:
    """Of distributions that agree in part, with padding columns, one row equal on both sides, and one masked."""
    teacher = 6 * draw(4, columns, device=device, seed=3) + 15
    student = teacher + 2 * draw(4, columns, device=device, seed=4)
    student[1] = teacher[1]
    for logits in (student, teacher):
        logits[:, columns - 2 :] = -torch.inf
    mask, upstream = torch.tensor([True, True, False, True], device=device), draw(4, device=device, seed=5)
    student, teacher = student.to(dtype), teacher.to(dtype)
    results = []
    for kernel, wide in ((True, torch.clone), (False, torch.Tensor.double)):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "usable", lambda _, kernel=kernel: kernel)
            leaf = wide(student).requires_grad_()
            value = divergence(
                leaf * 1, wide(teacher), kind=build_divergence(kind, **dense.KINDS[kind]), group=None, mask_T=mask,
                temperature=temperatures[0], teacher_temperature=temperatures[1], reuse_logits=reuse,
            )  # fmt: skip
            results.append((value, torch.autograd.grad(value, leaf, upstream.to(value.dtype))[0]))
    (value, gradient), (exact_value, exact_gradient) = results
    assert gradient.dtype == dtype and not gradient[2].any()
    assert value[1] < 1e-5 or temperatures[0] != temperatures[1]
    torch.testing.assert_close(value.double(), exact_value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient.double(), exact_gradient, atol=10 * EXACT[dtype], rtol=10 * EXACT[dtype])


def check_sampling(monkeypatch, device: str, *, temperature: float, top_p: float, columns: int) -> None:
    """The same tokens as without kernels."""
    logits = 3 * draw(16, columns, device=device)
    logits[:, -3:] = -torch.inf
    numbers = sampler.uniforms(1, 2, range(16), 0)
    sampled = []
    for kernel in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "usable", lambda _, kernel=kernel: kernel)
            sampled.append(
                sampler.sample_tokens(
                    logits, numbers, temperature=temperature, top_p=top_p, vocab_start=0, group=Alone()
                )
            )
    ours, plain = sampled
    assert torch.equal(ours.tokens, plain.tokens)
    torch.testing.assert_close(ours.log_probs, plain.log_probs, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(ours.entropies, plain.entropies, atol=4e-6, rtol=2e-6)


ROTATIONS = [
    {"tokens": 7, "heads": 3, "size": 16},
    {"tokens": 5, "heads": 4, "size": 80},
    {"tokens": 2, "heads": 33, "size": 128},
]
ATTENTIONS = [
    {"heads": 4, "kv_heads": 2, "size": 16, "positions": 96, "window": None},
    {"heads": 8, "kv_heads": 1, "size": 24, "positions": 70, "window": 5},
    {"heads": 3, "kv_heads": 3, "size": 128, "positions": 530, "window": None},
    {"heads": 4, "kv_heads": 4, "size": 32, "positions": 1100, "window": 300},
]
GATES = [{"tokens": 5, "columns": 24}, {"tokens": 3, "columns": 1500}]
SOFTMAXES = [
    {"tokens": 3, "columns": 9000, "entropy": True, "reuse": True},
    {"tokens": 4, "columns": 33, "entropy": False, "reuse": False},
    {"tokens": 2, "columns": 4096, "entropy": True, "reuse": False},
]
DIVERGENCES = [{"kind": kind, "columns": 3000, "reuse": True} for kind in dense.KINDS] + [
    {"kind": "reverse_kl", "columns": 70, "reuse": False, "temperatures": (0.7, 1.5)},
    {"kind": "jensen_shannon", "columns": 2050, "reuse": False, "temperatures": (2.0, 0.5)},
]
SAMPLINGS = [
    {"temperature": 1.0, "top_p": 1.0, "columns": 3001},
    {"temperature": 0.6, "top_p": 1.0, "columns": 512},
    {"temperature": 0.0, "top_p": 1.0, "columns": 3001},
    {"temperature": 1.2, "top_p": 0.8, "columns": 300},
]
_CHECKS = {
    "rotation": (check_rotation, ROTATIONS),
    "swiglu": (check_swiglu, GATES),
    "attention and append": (check_attention, ATTENTIONS),
    "log-prob and entropy": (check_log_prob_and_entropy, SOFTMAXES),
    "divergence": (check_divergence, DIVERGENCES),
}


def every_case(more: Mapping[str, Sequence[dict[str, Any]]] = MappingProxyType({})) -> pytest.MarkDecorator:
    """Every check that there is in several formats, as ``check`` and ``case``. Args: more: further cases of checks."""
    cases = [
        pytest.param(check, case, id=f"{name} {case}")
        for name, (check, some) in _CHECKS.items()
        for case in (*some, *more.get(name, ()))
    ]
    return pytest.mark.parametrize(("check", "case"), cases)
