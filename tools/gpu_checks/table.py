"""All checks, in order of worth."""

from gpu_checks.check import Check

_STEP = ("steps", "loss", "grad_norm", "step_s", "peak_mb")
_VARIANT = (*_STEP, "first_loss", "first_loss_of_whole_run")
_FP8 = "student.precision.fp8={{recipe: {}{}}}"


def _variant(name: str, *overrides: str, on_cpu: tuple[str, ...] = (), gpu: bool = False) -> Check:
    options = {"name": name, "overrides": overrides, "on_cpu": on_cpu}
    return Check(name, "commands:variant", _VARIANT, 15, options, ("whole_run",), gpu)


CHECKS = [
    Check("card", "card:card", ("card", "driver", "bf16_tflops", "copy_gb_s", "to_host_gb_s", "launch_us"), 15),
    Check("models", "commands:models", ("make_s", "convert_s"), 15),
    Check("whole_run", "commands:whole_run", (*_STEP, "first_loss"), 20, needs=("models",)),
    Check("resume", "commands:resume", _STEP, 15, needs=("whole_run",)),
    _variant("full", "loss.estimator=full"),
    _variant("fp8", _FP8.format("tensorwise", ""), on_cpu=(_FP8.format("tensorwise", ", emulate: true"),)),
    _variant("offloaded_run", "student.offload=true", "teachers.math.offload=true", "teachers.code.offload=true"),
    _variant("local_spec", "student.layer_spec=local", gpu=True),
    Check("export", "commands:export", ("export_s", "step", "logits_moved_by"), 10, needs=("resume",)),
]
