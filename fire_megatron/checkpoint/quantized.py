"""Weights that are themselves FP8 (``precision.fp8.param_gather``).

They have no memory of their values to read into, so a checkpoint's values are put together in a tensor of their own and
quantised as a whole.

Their kinds are Transformer Engine's; nothing here needs it where it is not installed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from megatron.core.fp8_utils import is_float8tensor


def is_quantized(parameter: torch.Tensor) -> bool:
    """Whether a parameter holds FP8 numbers and scales in place of its values."""
    return is_float8tensor(parameter)


@contextlib.contextmanager
def stand_ins(model: torch.nn.Module) -> Iterator[None]:
    """Inside, a tensor without memory stands in each quantised parameter's place, of which parts can be taken: their
    shapes, strides and offsets say where they lie."""
    taken = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and is_quantized(parameter):
                taken.append((module, name, parameter))
    for module, name, parameter in taken:
        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        module._parameters[name] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
    try:
        yield
    finally:
        for module, name, parameter in taken:
            module._parameters[name] = parameter


def quantize_into(parameter: torch.nn.Parameter, values: torch.Tensor) -> None:
    """Make a quantised parameter stand for ``values`` (of its shape, any float dtype).

    Until an optimizer has made its float32 weights from it, a parameter keeps what it was made from on the CPU
    (Transformer Engine's ``preserve_high_precision_init_val``); that is what the optimizer is to begin with.
    """
    with torch.no_grad():
        parameter.copy_(values)
    if getattr(parameter, "_high_precision_init_val", None) is not None:
        parameter._high_precision_init_val = values.detach().to("cpu", copy=True)
