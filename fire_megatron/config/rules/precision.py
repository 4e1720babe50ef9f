"""Rules on ``precision.fp8``."""

from __future__ import annotations

from collections.abc import Iterator

from fire_megatron.config.errors import RecipeProblem
from fire_megatron.config.rules.facts import Facts, Role

BLOCK = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}
"""Values that an FP8 product takes together, by recipe: megatron-core's get_fp8_align_size."""


def fp8(role: Role) -> Iterator[RecipeProblem]:
    settings, name = role.config.precision.fp8, role.at("precision.fp8")
    if settings is None:
        return
    layers, stages = role.shape and role.shape.num_layers, role.config.parallel.pipeline
    if layers and settings.first_last_bf16 > (most := min((layers - 1) // 2, layers // stages)):
        yield RecipeProblem(
            f"{name}.first_last_bf16",
            f"{settings.first_last_bf16} layers at each end of the model's {layers}, over {stages} pipeline stages; at "
            f"most {most} leave a layer in FP8 and fit the first and the last stage",
        )
    if not role.trains and settings.recipe == "delayed":
        yield RecipeProblem(
            f"{name}.recipe",
            "delayed takes its scales from earlier training passes, and a teacher has none; take tensorwise",
        )
    if not role.trains and not settings.is_default("format"):
        yield RecipeProblem(
            f"{name}.format", "has no effect, since formats differ in gradients and a teacher has none; leave it out"
        )
    yield from _emulation(role) if settings.emulate else _engine(role)


def _emulation(role: Role) -> Iterator[RecipeProblem]:
    """FP8 as a CPU emulates it."""
    key = role.at("precision.fp8.emulate")
    if role.kind == "cuda":
        yield RecipeProblem(
            key,
            "true is FP8 on a CPU and the run is on a GPU; leave it out for Transformer Engine's FP8, or set "
            "run.device=cpu",
        )
    if role.config.layer_spec == "te":
        yield RecipeProblem(
            key,
            f"true, but {role.at('layer_spec')} is te, whose layers round by themselves; leave out one of them",
        )


def _engine(role: Role) -> Iterator[RecipeProblem]:
    """FP8 as Transformer Engine computes it."""
    settings, name, dtype = role.config.precision.fp8, role.at("precision.fp8"), role.config.precision.on("cuda").dtype
    assert settings is not None
    missing = role.machine and not role.no_engine and role.machine.no_fp8(settings.recipe)
    if role.no_engine:
        yield RecipeProblem(
            name,
            f"needs Transformer Engine's layers on a GPU and {role.no_engine}; change it, or set {name}.emulate=true "
            "on a CPU",
        )
    if missing:
        yield RecipeProblem(
            f"{name}.recipe",
            f"{settings.recipe!r} does not work on this GPU ({missing}); take another recipe (tensorwise works on "
            f"every GPU with FP8), or leave out {name}",
        )
    if dtype != "bfloat16":
        yield RecipeProblem(
            role.at("precision.dtype"), f"{dtype}, but between FP8 products values are bfloat16; set it to bfloat16"
        )
    yield from _sizes(role, BLOCK[settings.recipe])
    if settings.param_gather:
        yield from _weights(role)


def _sizes(role: Role, block: int) -> Iterator[RecipeProblem]:
    """The first size of a linear layer's matrices on a rank that FP8 products cannot be cut from."""
    settings, shape, tensor = role.config.precision.fp8, role.shape, role.config.parallel.tensor
    assert settings is not None
    if shape is None:
        return
    sizes = {
        "hidden size": shape.hidden,
        "query heads": shape.heads * shape.head_dim // tensor,
        "query, key and value heads": (shape.heads + 2 * shape.kv_heads) * shape.head_dim // tensor,
        **{f"width of {name}": width // tensor for name, width in shape.mlp_widths.items()},
    }
    wrong = next((name for name, size in sizes.items() if size % block), None)
    if wrong:
        yield RecipeProblem(
            role.at("precision.fp8.recipe"),
            f"{settings.recipe!r} multiplies in blocks of {block}, which does not divide the model's {wrong} of "
            f"{sizes[wrong]} on each of {tensor} tensor-parallel ranks; lower {role.at('parallel.tensor')}, take "
            f"{'recipe tensorwise' if block > 16 else 'bf16'}, or another model",
        )


def _weights(role: Role) -> Iterator[RecipeProblem]:
    """Weights that are themselves FP8."""
    settings, key = role.config.precision.fp8, role.at("precision.fp8.param_gather")
    assert settings is not None
    if settings.recipe == "delayed":
        yield RecipeProblem(
            key,
            "true with recipe delayed would quantise the loaded weights with a scale of 1, as there are no earlier "
            "steps; take recipe tensorwise or blockwise",
        )
    if settings.recipe == "mxfp8":
        yield RecipeProblem(
            key,
            "true with recipe mxfp8 has megatron-core gather weights through the gradients' memory, which is not "
            "supported here; take recipe tensorwise or blockwise, or leave it out",
        )
    if role.config.offload:
        yield RecipeProblem(
            key, f"true, but FP8 weights cannot wait on the host ({role.at('offload')}); leave out one of them"
        )


def fp8_optimizer(facts: Facts) -> Iterator[RecipeProblem]:
    settings = facts.recipe.student.precision.fp8
    if settings and settings.param_gather and not settings.emulate and not facts.recipe.optimizer.distributed:
        yield RecipeProblem(
            "student.precision.fp8.param_gather",
            "true, but only the distributed optimizer makes the FP8 weights again after an update; set "
            "optimizer.distributed=true or leave it out",
        )
