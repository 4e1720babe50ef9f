"""The kernels, interpreted: see kernel_checks.py. The interpreter does not multiply bfloat16."""

import kernel_checks as checks
import pytest
import torch
from interpreted import needs_triton

from fire_megatron import kernels

pytestmark = needs_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@checks.every_case()
def test_against_float64(monkeypatch, dtype, check, case):
    check(monkeypatch, DEVICE, dtype, **case)


def test_positions_are_shared_where_rows_are_few(monkeypatch):
    assert checks.check_attention(monkeypatch, DEVICE, torch.float32, **checks.ATTENTIONS[-1]) > 1


@pytest.mark.parametrize("how", checks.SAMPLINGS, ids=str)
def test_sampling(monkeypatch, how):
    checks.check_sampling(monkeypatch, DEVICE, **how)


def test_a_row_without_mass_is_finite():
    from fire_megatron.kernels.softmax import softmax_sums

    peak, total, moment = softmax_sums(torch.full((2, 5), -torch.inf, device=DEVICE))
    assert peak.isfinite().all() and not total.any() and not moment.any()


def test_other_formats_and_devices_are_left_to_torch():
    assert not kernels.usable(torch.zeros(1, dtype=torch.float64, device=DEVICE))
    assert not kernels.usable(torch.zeros(1))
