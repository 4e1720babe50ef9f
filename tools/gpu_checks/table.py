"""All checks, in order of worth."""

from gpu_checks.check import Check

_STEP = ("steps", "loss", "grad_norm", "step_s", "peak_mb")
_VARIANT = (*_STEP, "first_loss", "first_loss_of_whole_run")
_FUSED = (
    "seconds", "products_seconds", "ratio", "peak_mb", "full_logits_peak_mb",
    "value_error", "hidden_gradient_error", "weight_gradient_error",
)  # fmt: skip
_OFFLOAD = ("equal_after_each_return", "to_host_gb_s", "from_host_gb_s", "allocated_growth_mb", "reserved_growth_mb")
_DECODE = (
    "ms_a_token", "floor_ms", "times_floor", "tokens_per_second", "peak_mb", "allocated_growth_mb",
    "launches", "graphs", "waits", "copies_to_host", "operators",
)  # fmt: skip
_TRAINING = ("seconds", "tokens_per_second", "model_tflops", "of_peak", "peak_mb", "loss", "grad_norm")
_FP8 = "student.precision.fp8={{recipe: {}{}}}"


def _variant(name: str, *overrides: str, on_cpu: tuple[str, ...] = (), gpu: bool = False) -> Check:
    options = {"name": name, "overrides": overrides, "on_cpu": on_cpu}
    return Check(name, "commands:variant", _VARIANT, 15, options, ("whole_run",), gpu)


def _peer(rows: int, *, compiled: bool = False) -> Check:
    name, figures = f"transformers_{rows}{'_compiled' if compiled else ''}", ("ms_a_token", "ours_to_theirs")
    options = {"rows": rows, "compiled": compiled}
    return Check(name, "decode:decode_peer", figures, 90 if compiled else 30, options, gpu=compiled)


def _low(recipe: str) -> Check:
    """A training step in FP8."""
    name, figures = f"training_step_{recipe}", (*_TRAINING, "seconds_to_bf16")
    return Check(name, "training:training_step", figures, 30, {"fp8": recipe}, ("training_step",), gpu=True)


CHECKS = [
    Check("card", "card:card", ("card", "driver", "bf16_tflops", "copy_gb_s", "to_host_gb_s", "launch_us"), 15),
    Check("models", "commands:models", ("make_s", "convert_s"), 15),
    Check("whole_run", "commands:whole_run", (*_STEP, "first_loss"), 20, needs=("models",)),
    Check("resume", "commands:resume", _STEP, 15, needs=("whole_run",)),
    Check(
        "agreement",
        "agreement:agreement",
        tuple(f"{side}_from_float32_{what}" for side in ("engine", "trainer", "teacher") for what in ("mean", "max"))
        + ("engine_from_trainer_mean", "output_layer_max"),
        25,
    ),
    Check("decode_32", "decode:decode", _DECODE, 30, {"rows": 32}),
    Check("training_step", "training:training_step", _TRAINING, 30),
    Check("decode_256", "decode:decode", _DECODE, 40, {"rows": 256}),
    _peer(32),
    _peer(256),
    Check("fused_loss_sampled", "fused_loss:fused_loss", _FUSED, 15, {"estimator": "sampled"}),
    Check("fused_loss_full", "fused_loss:fused_loss", _FUSED, 15, {"estimator": "full"}),
    Check("offload", "memory:offload", _OFFLOAD, 20),
    Check("communicators", "memory:communicators", ("group_1_made_mb", "group_1_used_mb"), 12, gpu=True),
    _variant("full", "loss.estimator=full"),
    _variant("fp8", _FP8.format("tensorwise", ""), on_cpu=(_FP8.format("tensorwise", ", emulate: true"),)),
    _variant("offloaded_run", "student.offload=true", "teachers.math.offload=true", "teachers.code.offload=true"),
    _variant("local_spec", "student.layer_spec=local", gpu=True),
    _low("tensorwise"),
    _low("blockwise"),
    _low("delayed"),
    Check("export", "commands:export", ("export_s", "step", "logits_moved_by"), 10, needs=("resume",)),
    _peer(32, compiled=True),
]
