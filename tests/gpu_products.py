"""A CPU that multiplies as a GPU does: half-precision factors, float32 results where they are asked for."""

from __future__ import annotations

import torch

from fire_megatron.losses import fused, products

TORCHES = ((2, 13), (2, 9), (2, 7))
"""Releases of torch that multiply half precision into float32 and add to it, multiply alone, and neither."""


def pretend_gpu(monkeypatch, release: tuple[int, int]) -> list[str]:
    """Let the losses take their CPU's tensors for a GPU's, with a torch of that release.

    Returns:
        Names of the products that have widened, as they come.
    """
    real, widened = {"mm": torch.mm, "addmm": torch.addmm}, []

    def product(name, *matrices, out_dtype=None, out=None):
        *total, a, b = matrices
        assert a.dtype == b.dtype, (a.dtype, b.dtype)
        if out_dtype is None:
            return real[name](*matrices) if out is None else real[name](*matrices, out=out)
        assert name == "mm" or release >= (2, 10), f"this torch has no {name} with out_dtype"
        assert release >= (2, 8) and out_dtype == torch.float32 and a.dtype in (torch.bfloat16, torch.float16)
        assert out is None or out.dtype == out_dtype
        assert not total or (total[0] is out and out.dtype == out_dtype), "torch adds in place to what is the result"
        widened.append(name)
        value = (a.double() @ b.double() + sum(x.double() for x in total)).float()
        return value if out is None else out.copy_(value)

    for name in real:
        monkeypatch.setattr(torch, name, lambda *matrices, _name=name, **options: product(_name, *matrices, **options))
    monkeypatch.setattr(products, "_MM_WIDENS", release >= (2, 8))
    monkeypatch.setattr(products, "_ADDMM_WIDENS", release >= (2, 10))
    for module in (products, fused):
        monkeypatch.setattr(module, "device_kind", lambda _: "cuda")
    return widened
