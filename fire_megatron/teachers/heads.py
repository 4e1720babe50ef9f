"""The teachers' output weights on the student's last stage, sharded as the student's own vocabulary.

Shapes: V entries of this rank's vocabulary shard in use, H a teacher's hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fire_megatron.checkpoint.loading import load_output_rows
from fire_megatron.config.hf_config import ModelShape
from fire_megatron.config.schema import TeacherConfig
from fire_megatron.losses.fused import OutputLayer
from fire_megatron.models.build import model_dtype
from fire_megatron.models.gpt import FireGPT
from fire_megatron.platform.device import compute_device, device_kind


def teacher_heads(
    teachers: Mapping[str, TeacherConfig],
    shapes: Mapping[str, ModelShape],
    models: Mapping[str, FireGPT],
    student: FireGPT,
) -> dict[str, OutputLayer]:
    """Read this rank's rows of each teacher's output weight from its checkpoint; none but on the student's last stage.

    Where a teacher's own last stage on this rank holds the same rows, its memory is shared.

    Args:
        teachers: recipe sections, by name.
        shapes: their architectures, by name.
        models: this rank's stages of those that it holds and that lend their weight, by name.
        student: this rank's stage of the student.

    Raises:
        CheckpointError: a checkpoint cannot be read.
    """
    if not student.post_process:
        return {}
    start, rows = student.vocab_start, student.used_columns
    heads = {}
    for name, config in teachers.items():
        own = models.get(name)
        if own is not None and own.post_process and own.vocab_start == start and own.used_columns == rows:
            weight = own.output_weight
        else:
            dtype = model_dtype(config.precision, device_kind(compute_device()))
            weight = torch.empty((rows, shapes[name].hidden), dtype=dtype, device=compute_device())
            load_output_rows(weight, config.checkpoint, shapes[name], first_row=start)
        heads[name] = OutputLayer(weight, rows)
    return heads
