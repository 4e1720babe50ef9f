"""The kernels, compiled: see kernel_checks.py."""

import kernel_checks as checks
import pytest
import torch

pytestmark = pytest.mark.gpu
FORMATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
REAL = {"heads": 32, "kv_heads": 8, "size": 128, "positions": 4000}


@FORMATS
@pytest.mark.parametrize("shape", [*checks.ROTATIONS, {"tokens": 4096, "heads": 32, "size": 128}], ids=str)
def test_rotation(monkeypatch, dtype, shape):
    checks.check_rotation(monkeypatch, "cuda", dtype, **shape)


@FORMATS
@pytest.mark.parametrize("shape", [*checks.GATES, {"tokens": 4096, "columns": 9728}], ids=str)
def test_swiglu(monkeypatch, dtype, shape):
    checks.check_swiglu(monkeypatch, "cuda", dtype, **shape)


@FORMATS
@pytest.mark.parametrize("shape", [*checks.ATTENTIONS, REAL | {"window": None}, REAL | {"window": 1024}], ids=str)
def test_attention_and_append(dtype, shape):
    checks.check_attention("cuda", dtype, **shape)


@FORMATS
@pytest.mark.parametrize(
    "shape", [*checks.SOFTMAXES, {"tokens": 64, "columns": 151936, "entropy": True, "reuse": True}], ids=str
)
def test_log_prob_and_entropy(monkeypatch, dtype, shape):
    checks.check_log_prob_and_entropy(monkeypatch, "cuda", dtype, **shape)


@FORMATS
@pytest.mark.parametrize(
    "how", [*checks.DIVERGENCES, {"kind": "reverse_kl", "columns": 151936, "reuse": True}], ids=str
)
def test_divergence(monkeypatch, dtype, how):
    checks.check_divergence(monkeypatch, "cuda", dtype, **how)


@pytest.mark.parametrize("how", [*checks.SAMPLINGS, checks.SAMPLINGS[0] | {"columns": 151936}], ids=str)
def test_sampling(monkeypatch, how):
    checks.check_sampling(monkeypatch, "cuda", **how)
