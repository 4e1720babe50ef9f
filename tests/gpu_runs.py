"""Runs of the tiny recipe for the tests marked ``gpu``, each a launch of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from processes import TRAIN, call
from tiny_run import read_metrics, tiny_recipe, write_recipe

KEYS = ("loss", "grad_norm", "teacher/math/reverse_kl", "teacher/code/reverse_kl", "fire/keep_ratio")
"""Metrics of a step that depend on every part of it."""


def write(
    inputs: Path,
    name: str,
    *,
    device: str,
    layer_spec: str = "local",
    dtype: str = "float32",
    parallel: dict[str, int] | None = None,
    fp8: dict[str, Any] | None = None,
    teachers_fp8: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A recipe over ``make_inputs``'s files, greedy so that rounding does not choose other tokens.

    Args:
        inputs: their folder; the run's folder ``name`` and its recipe go there too.
        name: of the run.
        device: ``cpu`` or ``cuda``.
        layer_spec: of every role, as the next two are.
        dtype: ``precision.dtype``.
        parallel: the layout.
        fp8: the student's ``precision.fp8``.
        teachers_fp8: the teachers'.
        changes: values of any other key, as ``tiny_recipe`` takes them.
    """
    settings = {"rollout__temperature": 0.0, "optimizer__lr": 1e-4, "checkpoint__final": False} | changes
    values = tiny_recipe(inputs, inputs / name, run__device=device, **settings)
    for key, role in {"student": values["student"], **values["teachers"]}.items():
        low = fp8 if key == "student" else teachers_fp8
        role |= {"layer_spec": layer_spec, "precision": {"dtype": dtype} | ({"fp8": low} if low else {})}
        role |= {"parallel": dict(parallel)} if parallel else {}
    return write_recipe(inputs / f"{name}.yaml", values)


def train(recipe: Path, *overrides: str, ranks: int = 1) -> list[dict[str, Any]]:
    """Metrics of a recipe's run, step by step; the run's folder has the recipe's name."""
    call(*TRAIN, recipe, *overrides, ranks=ranks, timeout=600)
    return read_metrics(recipe.with_suffix(""))


def run(inputs: Path, name: str, *, ranks: int = 1, **settings: Any) -> list[dict[str, Any]]:
    """:func:`write` and :func:`train`."""
    return train(write(inputs, name, **settings), ranks=ranks)


def assert_close(
    found: dict[str, Any], expected: dict[str, Any], *, keys: Sequence[str] = KEYS, rel: float = 2e-3
) -> None:
    """Compare metrics of a step, which has none of a teacher without rows. The default is for float32 on both sides,
    summed in other orders."""
    there = [key for key in keys if key in expected]
    assert there == [key for key in keys if key in found] and len(there) >= min(2, len(keys)), (there, found)
    for key in there:
        assert found[key] == pytest.approx(expected[key], rel=rel, abs=1e-4), key


def need_gpus(count: int) -> None:
    """Skip the test where there are fewer."""
    import torch

    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs, and this machine has {torch.cuda.device_count()}")
