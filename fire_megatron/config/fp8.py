"""``precision.fp8`` against a role's other settings and its model. What a machine can do, its processes find out."""

from __future__ import annotations

from collections.abc import Iterator

from fire_megatron.config.errors import Problem
from fire_megatron.config.schema import Recipe, RoleConfig


def fp8_problems(recipe: Recipe, key: str, role: RoleConfig, *, layers: int | None) -> Iterator[Problem]:
    """What of a role's FP8 settings cannot work.

    Args:
        recipe: the whole.
        key: the role's, such as ``teachers.math``.
        role: its section.
        layers: of its model; None when not known.
    """
    fp8, stages = role.precision.fp8, role.parallel.pipeline
    if fp8 is None:
        return
    if layers is not None and fp8.first_last_bf16:
        most = min((layers - 1) // 2, layers // stages)
        if fp8.first_last_bf16 > most:
            yield Problem(
                f"{key}.precision.fp8.first_last_bf16",
                f"{fp8.first_last_bf16} layers at each end of the model's {layers}, over {stages} pipeline stages; at "
                f"most {most} leave a layer in FP8 and fit the first and the last stage",
            )
    if key != "student" and fp8.recipe == "delayed":
        yield Problem(
            f"{key}.precision.fp8.recipe",
            "delayed takes its scales from earlier training passes, and a teacher has none; take tensorwise",
        )
    if fp8.emulate:
        yield from _emulation(recipe, key, role)
    else:
        yield from _engine(recipe, key, role)
        yield from _fp8_weights(recipe, key, role)


def _emulation(recipe: Recipe, key: str, role: RoleConfig) -> Iterator[Problem]:
    """FP8 as a CPU emulates it; where ``run.device`` is ``auto``, models/build.py looks again."""
    name = f"{key}.precision.fp8.emulate"
    if recipe.run.device == "cuda":
        yield Problem(
            name,
            "true is FP8 on a CPU and run.device is cuda; leave it out for Transformer Engine's FP8, or set "
            "run.device=cpu",
        )
    if role.layer_spec == "te":
        yield Problem(
            name, f"true, but {key}.layer_spec is te, whose layers round by themselves; leave out one of them"
        )


def _engine(recipe: Recipe, key: str, role: RoleConfig) -> Iterator[Problem]:
    """FP8 as Transformer Engine computes it."""
    fp8, name = role.precision.fp8, f"{key}.precision.fp8"
    assert fp8 is not None
    if role.layer_spec == "local" or recipe.run.device == "cpu":
        why = f"{key}.layer_spec is local" if role.layer_spec == "local" else "run.device is cpu"
        yield Problem(
            name,
            f"needs Transformer Engine's layers on a GPU and {why}; change it, or set {name}.emulate=true on a CPU",
        )
    if role.precision.on("cuda").dtype != "bfloat16":
        yield Problem(
            f"{key}.precision.dtype",
            f"{role.precision.dtype}, but between FP8 products values are bfloat16; set it to bfloat16",
        )


def _fp8_weights(recipe: Recipe, key: str, role: RoleConfig) -> Iterator[Problem]:
    """Weights that are themselves FP8."""
    fp8, name = role.precision.fp8, f"{key}.precision.fp8.param_gather"
    assert fp8 is not None
    if not fp8.param_gather:
        return
    if fp8.recipe == "delayed":
        yield Problem(
            name,
            "true with recipe delayed would quantise the loaded weights with a scale of 1, as there are no earlier "
            "steps; take recipe tensorwise or blockwise",
        )
    if fp8.recipe == "mxfp8":
        yield Problem(
            name,
            "true with recipe mxfp8 has megatron-core gather weights through the gradients' memory, which is not "
            "supported here; take recipe tensorwise or blockwise, or leave it out",
        )
    if key == "student" and not recipe.optimizer.distributed:
        yield Problem(
            name,
            "true, but only the distributed optimizer makes FP8 weights anew after an update; set "
            "optimizer.distributed=true or leave it out",
        )
    if role.offload:
        yield Problem(name, f"true, but FP8 weights cannot wait on the host ({key}.offload); leave out one of them")
