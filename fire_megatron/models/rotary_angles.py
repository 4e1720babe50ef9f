"""Rotary angles, with transformers' scalings of the frequencies to longer contexts.

Two of these (``dynamic``, ``longrope``) take other frequencies for longer rows, so that a token's angle depends on
tokens that may not be sampled yet. docs/decisions.md says what length they take.

Shapes: D rotated dimensions of a head, F = D / 2 frequencies.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from fire_megatron.config.hf_config import ModelShape
from fire_megatron.config.rope import BY_LENGTH


def _plain(shape: ModelShape, theta: float | torch.Tensor, factors: Any = 1.0) -> torch.Tensor:
    """[..., F] float32 frequencies of a base [...], divided by ``factors`` (RoPE: Su et al. 2021, arXiv 2104.09864)."""
    device = None
    if isinstance(theta, torch.Tensor):  # made there, since CUDA graphs take nothing from the host
        theta, device = theta.unsqueeze(-1), theta.device
    exponent = torch.arange(0, shape.rotary_dim, 2, dtype=torch.int64, device=device).float() / shape.rotary_dim
    return 1.0 / (factors * theta**exponent)


def _llama3(shape: ModelShape, scaling: dict[str, Any]) -> torch.Tensor:
    """The piecewise rescaling published with Llama 3.1."""
    plain, factor = _plain(shape, shape.rope_theta), scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)  # over the trained context
    blend = ((turns - low) / (high - low)).clamp(0, 1)  # 0: scaled down by factor; 1: left alone
    return plain * (blend + (1 - blend) / factor)


def _yarn(shape: ModelShape, scaling: dict[str, Any]) -> torch.Tensor:
    """Peng et al. 2023, arXiv 2309.00071, section 3.2, whose ramp goes over dimensions and not over turns."""
    original, width = scaling["original_max_position_embeddings"], shape.rotary_dim

    def dimension(turns: float) -> float:
        """The frequency that turns so often over the trained context."""
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(shape.rope_theta))

    low, high = dimension(scaling["beta_fast"]), dimension(scaling["beta_slow"])
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return _plain(shape, shape.rope_theta, scaling["factor"]) * (1 - kept) + _plain(shape, shape.rope_theta) * kept


def _dynamic(shape: ModelShape, scaling: dict[str, Any], lengths: torch.Tensor) -> torch.Tensor:
    """A base that grows with the row (published by its author as "Dynamically Scaled RoPE")."""
    original, factor, width = scaling["original_max_position_embeddings"], scaling["factor"], shape.rotary_dim
    growth = factor * lengths.clamp(min=original) / original - (factor - 1)
    return _plain(shape, shape.rope_theta * growth ** (width / (width - 2)))


def _longrope(shape: ModelShape, scaling: dict[str, Any], factors: str) -> torch.Tensor:
    """Ding et al. 2024, arXiv 2402.13753: one set of factors within the trained context, another for longer rows."""
    return _plain(shape, shape.rope_theta, torch.tensor(scaling[factors]))


def rotary_frequencies(shape: ModelShape) -> torch.Tensor:
    """[F] float32 inverse frequencies with the model's scaling, of rows within the context that it was trained with."""
    scaling = shape.rope_scaling or {"rope_type": "default"}
    match scaling["rope_type"]:
        case "llama3":
            return _llama3(shape, scaling)
        case "yarn":
            return _yarn(shape, scaling)
        case "longrope":
            return _longrope(shape, scaling, "short_factor")
        case "linear":
            return _plain(shape, shape.rope_theta) / scaling["factor"]
        case kind:
            assert kind in ("default", "dynamic"), kind
            return _plain(shape, shape.rope_theta)


class RotaryAngles:
    """Cosines and sines of a model's positions."""

    def __init__(self, shape: ModelShape, *, device: torch.device, dtype: torch.dtype) -> None:
        """Args: device: of the positions; dtype: of what is returned."""
        self._shape, self._dtype, self._scaling = shape, dtype, shape.rope_scaling or {}
        self._scale = self._scaling.get("attention_factor", 1.0)
        self._by_length = self._scaling.get("rope_type") in BY_LENGTH
        self._longest: int | None = None
        self.inv_freq = rotary_frequencies(shape).to(device)
        """[F] float32. Changed in place, since CUDA graphs hold its address."""
        self._short = self._long = self.inv_freq.clone()
        if self._scaling.get("rope_type") == "longrope":
            self._long = _longrope(shape, self._scaling, "long_factor").to(device)

    def _frequencies(self, lengths: torch.Tensor) -> torch.Tensor:
        """[...] int64 tokens of rows -> [..., F] float32, under a scaling that depends on them."""
        if self._scaling["rope_type"] == "dynamic":
            return _dynamic(self._shape, self._scaling, lengths)
        beyond = lengths.unsqueeze(-1) > self._scaling["original_max_position_embeddings"]
        return torch.where(beyond, self._long, self._short)

    @property
    def needs_lengths(self) -> bool:
        """Whether angles depend on the lengths of the rows that positions are of."""
        return self._by_length and self._longest is None

    def fix(self, longest: int | None) -> None:
        """From now on every row has the angles of a row of ``longest`` tokens; None: of its own length."""
        self._longest = longest
        if self._by_length and longest is not None:
            self.inv_freq.copy_(self._frequencies(torch.tensor(longest, device=self.inv_freq.device)))

    @contextlib.contextmanager
    def fixed(self, longest: int) -> Iterator[None]:
        """:meth:`fix` for a while."""
        before = self._longest
        self.fix(longest)
        try:
            yield
        finally:
            self.fix(before)

    def __call__(
        self, positions: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Angles of positions.

        Args:
            positions: [...] int64.
            lengths: [...] int64, tokens of the row that each position is of; read where they are needed.

        Returns:
            Cosines and sines [..., D].
        """
        inv_freq = self._frequencies(lengths) if self.needs_lengths else self.inv_freq
        angles = positions.unsqueeze(-1).float() * inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        if self._scale != 1.0:
            cos, sin = cos * self._scale, sin * self._scale
        return cos.to(self._dtype), sin.to(self._dtype)
