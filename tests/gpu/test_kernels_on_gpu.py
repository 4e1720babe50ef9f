"""The kernels, compiled: see kernel_checks.py."""

import kernel_checks as checks
import pytest
import torch

pytestmark = pytest.mark.gpu
HEADS = {"heads": 32, "kv_heads": 8, "size": 128, "positions": 4000}
REAL = {
    "rotation": [{"tokens": 4096, "heads": 32, "size": 128}],
    "swiglu": [{"tokens": 4096, "columns": 9728}],
    "attention and append": [HEADS | {"window": None}, HEADS | {"window": 1024}],
    "log-prob and entropy": [{"tokens": 64, "columns": 151936, "entropy": True, "reuse": True}],
    "divergence": [{"kind": "reverse_kl", "columns": 151936, "reuse": True}],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@checks.every_case(REAL)
def test_against_float64(monkeypatch, dtype, check, case):
    check(monkeypatch, "cuda", dtype, **case)


@pytest.mark.parametrize("how", [*checks.SAMPLINGS, checks.SAMPLINGS[0] | {"columns": 151936}], ids=str)
def test_sampling(monkeypatch, how):
    checks.check_sampling(monkeypatch, "cuda", **how)
