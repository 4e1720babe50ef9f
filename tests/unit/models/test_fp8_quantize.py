"""Rounding to FP8, bit by bit: against tables of all codes, torch's own casts and float64 scales by definition."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fire_megatron.models.fp8.quantize import (
    E4M3,
    E5M2,
    amax,
    cast,
    current_scale,
    delayed_scale,
    mx_exponent,
    quantize,
    quantize_blocks,
)

FORMATS = [E4M3, E5M2]
INF, NAN = math.inf, math.nan


def table(fmt):
    """Value of each of the codes 0 to 127 by the definition of the format (arXiv 2209.05433, table 1), in float64."""
    exponents, mantissas, bias = (4, 3, 7) if fmt is E4M3 else (5, 2, 15)
    values = []
    for code in range(128):
        exponent, mantissa = code >> mantissas, code & (2**mantissas - 1)
        fraction = mantissa / 2**mantissas
        value = 2.0 ** (1 - bias) * fraction if exponent == 0 else 2.0 ** (exponent - bias) * (1 + fraction)
        if fmt is E4M3 and code == 127:
            value = NAN
        if fmt is E5M2 and exponent == 2**exponents - 1:
            value = INF if mantissa == 0 else NAN
        values.append(value)
    return torch.tensor(values, dtype=torch.float64)


def nearest_codes(x, fmt):
    """Code of the nearest finite value, ties to the even code, saturating; in float64 by search of the whole table."""
    values = table(fmt)
    values = values[values.isfinite()]
    distance = (x.double().abs()[:, None] - values).abs()
    closest = distance == distance.amin(dim=1, keepdim=True)
    codes = torch.arange(len(values)).expand_as(closest)
    even = torch.where(closest & (codes % 2 == 0), codes, -1).amax(dim=1)
    code = torch.where(even >= 0, even, torch.where(closest, codes, -1).amax(dim=1))
    return (code + 128 * torch.signbit(x)).to(torch.uint8)


def hard_values(fmt):
    """Every value of the format, every middle between two, the neighbours of both, and what is too large."""
    values = table(fmt)
    values = values[values.isfinite()].float()
    middles = (values[1:] + values[:-1]) / 2
    base = torch.cat((values, middles, values.max() * torch.tensor([1.01, 1.07, 2.0, 1e9])))
    around = torch.cat((base, base.nextafter(torch.tensor(INF)), base.nextafter(torch.tensor(0.0))))
    return torch.cat((around, -around))


@pytest.mark.parametrize("fmt", FORMATS)
def test_codes_are_the_nearest_of_the_table(fmt):
    x = torch.cat((hard_values(fmt), torch.randn(4000) * torch.logspace(-7, 5, 4000)))
    assert torch.equal(cast(x, fmt).view(torch.uint8), nearest_codes(x, fmt))
    codes = torch.arange(256, dtype=torch.uint8).view(fmt)
    expected = torch.cat((table(fmt), -table(fmt)))
    assert torch.equal(codes.double().nan_to_num(nan=7e7), expected.nan_to_num(nan=7e7))


@pytest.mark.parametrize("fmt", FORMATS)
def test_codes_are_torchs_where_torch_does_not_overflow(fmt):
    x = hard_values(fmt)
    x = x[x.abs() <= torch.finfo(fmt).max]
    assert torch.equal(cast(x, fmt).view(torch.uint8), x.to(fmt).view(torch.uint8))
    assert len(x) > 500


@pytest.mark.parametrize("fmt", FORMATS)
def test_overflow_saturates_and_nan_stays(fmt):
    codes = cast(torch.tensor([INF, -INF, 1e9, NAN]), fmt).float()
    top = torch.finfo(fmt).max
    assert codes[:3].tolist() == [top, -top, top] and codes[3].isnan()


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9),
    fmt=st.sampled_from(FORMATS),
)
def test_tensorwise_is_torchs_cast_of_the_scaled_values(values, fmt):
    x = torch.tensor(values, dtype=torch.float32)
    rounded = quantize(x, fmt, current_scale(amax(x), fmt))
    peak = x.abs().max()
    scale = torch.tensor(1.0) if peak == 0 else (torch.finfo(fmt).max / peak).clamp(max=torch.finfo().max)
    by_torch = (x * scale).clamp(-torch.finfo(fmt).max, torch.finfo(fmt).max).to(fmt)
    assert torch.equal(rounded.codes.view(torch.uint8), by_torch.view(torch.uint8))
    assert torch.equal(rounded.values(), by_torch.float() * (1 / scale))


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_scale_uses_the_whole_range(fmt):
    x = torch.randn(50, 30) * 1e-5
    rounded = quantize(x, fmt, current_scale(amax(x), fmt))
    assert rounded.codes.float().abs().max() == torch.finfo(fmt).max
    step = 2**-4 if fmt is E4M3 else 2**-3
    normal = x.abs() > x.abs().max() * 2**-12
    assert ((rounded.values() - x).abs() / x.abs())[normal].max() <= step * 1.0001


@pytest.mark.parametrize("fmt", FORMATS)
def test_scales_of_what_has_no_magnitude(fmt):
    peaks = torch.tensor([0.0, INF, NAN, 1e-45])
    assert current_scale(peaks, fmt).tolist() == [1.0, 1.0, 1.0, torch.finfo().max]
    assert current_scale(peaks, fmt, power_of_two=True).tolist() == [1.0, 1.0, 1.0, 2.0**127]
    assert delayed_scale(peaks, torch.full((4,), 5.0), fmt, margin=3).tolist() == [5.0, 5.0, 5.0, torch.finfo().max]
    assert amax(torch.zeros(0, 8)) == 0
    assert quantize(torch.zeros(0, 8), fmt, torch.tensor(1.0)).values().shape == (0, 8)


def test_margin_leaves_powers_of_two_free():
    assert delayed_scale(torch.tensor(7.0), torch.tensor(0.0), E4M3, margin=2) == 448 / 7 / 4


@pytest.mark.parametrize("fmt", FORMATS)
def test_power_of_two_scales_are_rounded_down(fmt):
    peaks = torch.logspace(-30, 30, 500)
    scales = current_scale(peaks, fmt, power_of_two=True).double()
    exact = torch.finfo(fmt).max / peaks.double()
    assert torch.equal(scales.log2(), scales.log2().round())
    assert ((scales <= exact * (1 + 1e-7)) & (scales * 2 > exact * (1 - 1e-7))).all()


@pytest.mark.parametrize("fmt", FORMATS)
def test_mx_exponents_are_rounded_up(fmt):
    top = torch.finfo(fmt).max
    powers = top * 2.0 ** torch.arange(-100, 100)
    assert torch.equal(mx_exponent(powers.float(), fmt), torch.arange(27, 227, dtype=torch.int32))
    above = powers.float() * 1.000001
    assert torch.equal(mx_exponent(above, fmt), torch.arange(28, 228, dtype=torch.int32))
    special = torch.tensor([0.0, INF, NAN, torch.finfo().max, 2.0**-149])
    largest = math.ceil(math.log2(torch.finfo().max / top)) + 127
    assert mx_exponent(special, fmt).tolist() == [0, 254, 255, largest, 0]


def by_definition(x, fmt, block, mx):
    """Blocks one at a time, in float64 but for the cast."""
    out = torch.empty_like(x, dtype=torch.float64)
    top = torch.finfo(fmt).max
    for i in range(0, x.shape[0], block[0]):
        for j in range(0, x.shape[1], block[1]):
            part = x[i : i + block[0], j : j + block[1]].double()
            peak = part.abs().max().item()
            if peak == 0:
                scale = 1.0
            elif mx:
                scale = 2.0 ** -math.ceil(math.log2(peak / top))
            else:
                scale = 2.0 ** math.floor(math.log2(top / peak))
            codes = nearest_codes((part * scale).float().flatten(), fmt).view(fmt)
            out[i : i + block[0], j : j + block[1]] = (codes.double() / scale).view(part.shape)
    return out


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(
    ("block", "mx"),
    [((1, 128), False), ((128, 1), False), ((128, 128), False), ((1, 32), True), ((32, 1), True)],
)
@pytest.mark.parametrize("shape", [(128, 256), (130, 70), (1, 5)])
def test_blocks_are_rounded_each_by_its_own(fmt, block, mx, shape):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator) * torch.logspace(-6, 3, shape[1])
    x[0, :40] = 0
    rounded = quantize_blocks(x, fmt, block, mx=mx)
    assert rounded.codes.shape == x.shape and rounded.codes.is_contiguous()
    assert torch.equal(rounded.values().double(), by_definition(x, fmt, block, mx))


def test_no_block_without_rows_and_nan_only_in_its_block():
    assert quantize_blocks(torch.zeros(0, 64), E4M3, (32, 1), mx=True).values().shape == (0, 64)
    x = torch.ones(2, 64)
    x[0, 3] = NAN
    values = quantize_blocks(x, E4M3, (1, 32), mx=True).values()
    assert values[0, :32].isnan().all() and values[0, 32:].eq(1).all() and values[1].eq(1).all()
