"""A random batch of scores for the tests of the hooks."""

import pytest
import torch

from fire_megatron.fire.batch import FireBatch


@pytest.fixture
def random_batch():
    """Factory: rows, width, seed -> FireBatch of two teachers with lengths from 1 to width."""

    def make(rows: int = 12, width: int = 9, seed: int = 0) -> FireBatch:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, width + 1, (rows,), generator=generator)
        table = torch.rand(3, rows, width, generator=generator)
        return FireBatch(
            teacher_B=torch.randint(2, (rows,), generator=generator),
            teacher_names=("math", "code"),
            mask_BR=torch.arange(width) < lengths[:, None],
            teacher_logp_BR=-3 * table[0],
            teacher_entropy_BR=2 * table[1],
            student_entropy_BR=3 * table[2],
            truncated_B=lengths == width,
        )

    return make
