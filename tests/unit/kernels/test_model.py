"""A whole model with the kernels in place: sampling, log-probabilities and gradients as without them."""

import pytest
import torch
from interpreted import by_kernels, needs_triton
from models import VOCABULARY, save_megatron

from fire_megatron.checkpoint.loading import load_weights
from fire_megatron.config.hf_config import read_hf_config
from fire_megatron.config.loss import LossConfig
from fire_megatron.config.schema import OptimizerConfig, PrecisionConfig, StudentConfig
from fire_megatron.data.records import Prompt
from fire_megatron.data.rollouts import Target, TrainingRows
from fire_megatron.models.build import build_model
from fire_megatron.platform.device import Device
from fire_megatron.rollout.engine import MegatronEngine
from fire_megatron.rollout.sampling import Sampling
from fire_megatron.train.student import Student

pytestmark = needs_triton


# The second has a sliding window, the third one on some layers; the last rotates a part of each head.
@pytest.mark.parametrize("family", ["qwen3", "qwen2-windows", "phi3"])
def test_a_model(grid, tmp_path, monkeypatch, family):
    save_megatron(family, tmp_path / "m", num_hidden_layers=2)
    shape, role = read_hf_config(tmp_path / "m"), StudentConfig(checkpoint=str(tmp_path / "m"))
    prompts = [Prompt(i, "math", tuple(range(7, 7 + n)), "") for i, n in enumerate((3, 9, 1))]
    assert max(prompts[1].token_ids) < VOCABULARY
    found = []
    for kernels in (False, True):
        with monkeypatch.context() as patch:
            if kernels:
                by_kernels(patch)
            model = build_model(shape, role, grid, device=Device("cpu"))
            load_weights(model, tmp_path / "m", grid=grid)
            engine = MegatronEngine(model, grid)
            made = engine.generate(prompts, range(3), sampling=Sampling(max_new_tokens=3, seed=3), step=0)
            rows = TrainingRows(
                rollouts=made,
                targets=(Target(("t",)),) * 3,
                teacher_log_probs=tuple(x - 0.1 for x in made.log_probs),
                weights=tuple(torch.ones_like(x) for x in made.log_probs),
            )
            settings = {"loss": LossConfig(), "optimizer": OptimizerConfig(), "precision": PrecisionConfig()}
            student = Student(model, grid, **settings)
            log_probs = student.log_probs(rows)
            student.accumulate_gradients(rows, tokens=9.0)
            gradient = torch.cat([g.flatten() for g in student.gradients()])
        found.append((torch.cat(list(made.responses)), made.log_probs, made.entropies, log_probs, gradient))
    plain, ours = found
    assert torch.equal(ours[0], plain[0]) and plain[4].any()
    for got, want in zip(ours[1:], plain[1:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=5e-6)
