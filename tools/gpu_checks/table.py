"""All checks, in order of worth. Seconds are an H200's, rounded up; of what has not been measured there, guesses."""

from collections.abc import Sequence

from gpu_checks.check import Check

_CARD = ("card", "driver", "bf16_tflops", "copy_gb_s", "to_host_gb_s", "launch_us", "context_mb")
_STEP = ("steps", "loss", "grad_norm", "step_s", "peak_mb")
_AGREEMENT = (
    "engine_from_float32_mean", "engine_from_float32_max", "trainer_from_float32_mean", "trainer_from_float32_max",
    "teacher_from_float32_mean", "teacher_from_float32_max", "engine_from_trainer_mean", "engine_from_trainer_max",
    "engine_from_teacher_mean", "teacher_from_trainer_mean", "output_layer_max",
)  # fmt: skip
_DECODE = (
    "ms_a_token", "floor_ms", "times_floor", "tokens_per_second", "peak_mb", "allocated_growth_mb",
    "reserved_growth_mb", "launches", "graphs", "waits", "copies_to_host", "operators",
)  # fmt: skip
_TRAINING = ("seconds", "tokens_per_second", "model_tflops", "of_peak", "peak_mb", "loss", "grad_norm")
_SCORING = ("seconds", "tokens_per_second", "model_tflops", "of_peak", "peak_mb")
_FUSED = (
    "seconds", "products_seconds", "ratio", "peak_mb", "full_logits_peak_mb", "value_error", "hidden_gradient_error",
    "weight_gradient_error",
)  # fmt: skip
_OFFLOAD = ("equal_after_each_return", "to_host_gb_s", "from_host_gb_s", "allocated_growth_mb", "reserved_growth_mb")
_COMMUNICATORS = ("group_1_made_mb", "group_1_used_mb", "group_2_made_mb", "group_2_used_mb")
_PLANNED = (
    "planned_for", "decode_32_mb", "decode_32_mb_ratio", "decode_32_seconds", "decode_32_seconds_ratio",
    "decode_256_mb", "decode_256_mb_ratio", "decode_256_seconds", "decode_256_seconds_ratio",
    "training_step_mb", "training_step_mb_ratio", "training_step_seconds", "training_step_seconds_ratio",
    "fused_loss_sampled_mb", "fused_loss_sampled_mb_ratio",
    "whole_run_mb", "whole_run_mb_ratio", "whole_run_seconds", "whole_run_seconds_ratio",
)  # fmt: skip
_KERNELS = tuple(
    f"{name}_{what}"
    for name in ("rotary", "swiglu", "log_prob", "sampling", "attention_32", "attention_256", "attention_long")
    for what in ("us", "to_torch")
)
_PEER = ("ms_a_token", "tokens_per_second", "ours_to_theirs")
_TRL = ("step_s", "trl_step_s", "ratio", "peak_mb", "trl_peak_mb", "memory_ratio")
_TESTS = ("passed", "failed", "skipped")


def _variant(
    name: str,
    *overrides: str,
    on_cpu: Sequence[str] = (),
    same: bool = False,
    gpu: bool = False,
    fp8: str | None = None,
) -> Check:
    """``whole_run`` with other settings."""
    options = {"name": name, "overrides": overrides, "on_cpu": on_cpu, "same": same, "fp8": fp8}
    figures = (*_STEP, "first_loss", "first_loss_of_whole_run")
    return Check(name, "commands:variant", figures, 11, options, needs=("whole_run",), gpu=gpu)


def _peer(rows: int, *, compiled: bool = False) -> Check:
    """Compiling takes a minute or more, so it comes late."""
    name, options = f"transformers_{rows}{'_compiled' if compiled else ''}", {"rows": rows, "compiled": compiled}
    return Check(name, "decode:decode_peer", _PEER, 90 if compiled else 25 if rows == 32 else 50, options, gpu=compiled)


def _fp8_step(recipe: str) -> Check:
    options, figures = {"fp8": recipe}, (*_TRAINING, "seconds_to_bf16")
    name = f"training_step_{recipe}"
    return Check(name, "training:training_step", figures, 15, options, needs=("training_step",), gpu=True)


def _tests(file: str, seconds: float) -> Check:
    return Check(f"gpu_tests_{file}", "gpu_tests:gpu_tests", _TESTS, seconds, {"file": f"test_{file}.py"}, gpu=True)


_OFFLOADS = ("student.offload=true", "teachers.math.offload=true", "teachers.code.offload=true")
_FP8 = "student.precision.fp8={recipe: tensorwise}"

CHECKS = [
    Check("card", "card:card", _CARD, 5),
    Check("transformer_engine", "commands:transformer_engine", ("version",), 5, gpu=True),
    Check("models", "commands:models", ("make_s", "convert_s"), 5),
    Check("whole_run", "commands:whole_run", (*_STEP, "first_loss"), 20, needs=("models",)),
    Check("resume", "commands:resume", _STEP, 12, needs=("whole_run",)),
    Check("agreement", "agreement:agreement", _AGREEMENT, 15),
    Check("decode_32", "decode:decode", _DECODE, 18, {"rows": 32}),
    Check("training_step", "training:training_step", _TRAINING, 15),
    Check("decode_256", "decode:decode", _DECODE, 32, {"rows": 256}),
    Check("scoring", "scoring:scoring", _SCORING, 15),
    Check("fused_loss_sampled", "fused_loss:fused_loss", _FUSED, 5, {"estimator": "sampled"}),
    Check("fused_loss_full", "fused_loss:fused_loss", _FUSED, 5, {"estimator": "full"}),
    Check("kernels", "kernels:kernels", _KERNELS, 10, gpu=True),
    _tests("products_on_gpu", 12),
    _tests("kernels_on_gpu", 25),
    _fp8_step("tensorwise"),
    _fp8_step("blockwise"),
    _fp8_step("delayed"),
    Check("step_against_trl", "peers:step_against_trl", _TRL, 60, needs=("models",)),
    _tests("on_gpu", 60),
    Check("planned", "planned:planned", _PLANNED, 35, needs=("models",)),
    Check("offload", "memory:offload", _OFFLOAD, 8),
    Check("communicators", "memory:communicators", _COMMUNICATORS, 5, gpu=True),
    _variant("full", "loss.estimator=full"),
    _variant("fp8", _FP8, on_cpu=("student.precision.fp8.emulate=true",), fp8="tensorwise"),
    _variant("offloaded_run", *_OFFLOADS, same=True),
    _variant("local_spec", "student.layer_spec=local", gpu=True),
    Check("export", "commands:export", ("export_s", "step", "logits_moved_by"), 3, needs=("resume",)),
    _peer(32),
    _peer(256),
    _tests("gpu_monitor", 25),
    _peer(32, compiled=True),
    _tests("layouts_on_gpu", 15),
    _tests("fp8_on_gpu", 120),
]
