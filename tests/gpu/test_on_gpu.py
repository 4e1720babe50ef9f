"""The same recipe on a GPU as on the CPU: NCCL, Transformer Engine's layers where they are installed, bfloat16."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import dense
import pytest
from gpu_runs import assert_close, need_gpus, run
from models import save_megatron
from processes import call
from tiny_run import make_inputs

needs_te = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("gpu"), head_dim=32)


@pytest.mark.parametrize("layer_spec", ["local", pytest.param("te", marks=needs_te)])
def test_float32_equals_the_cpu(inputs, layer_spec):
    cpu = run(inputs, f"cpu-{layer_spec}", device="cpu")
    gpu = run(inputs, f"gpu-{layer_spec}", device="cuda", layer_spec=layer_spec)
    assert_close(gpu[0], cpu[0])


@pytest.mark.parametrize("layer_spec", ["local", pytest.param("te", marks=needs_te)])
def test_bfloat16_trains(inputs, layer_spec):
    for line in run(inputs, f"bf16-{layer_spec}", device="cuda", layer_spec=layer_spec, dtype="bfloat16"):
        assert math.isfinite(line["loss"]) and line["grad_norm"] > 0
        assert line["memory/peak_mb"] > 0


@needs_te
def test_grouped_experts_equal_the_cpu(inputs):
    """All experts of a layer in one kernel, against one after the other."""
    if not (inputs / "experts").exists():
        save_megatron("qwen3-moe", inputs / "experts", num_hidden_layers=2, head_dim=32)
    student = {"student__checkpoint": str(inputs / "experts")}
    cpu = run(inputs, "cpu-experts", device="cpu", **student)
    gpu = run(inputs, "gpu-experts", device="cuda", layer_spec="te", **student)
    assert_close(gpu[0], cpu[0])


@needs_te
@pytest.mark.parametrize("ranks", [1, 2])
def test_fused_attention_of_packs_equals_ours(ranks):
    """Also with each row on two GPUs, where there are two."""
    need_gpus(ranks)
    call(Path(__file__).with_name("te_attention.py"), ranks=ranks, timeout=600)


@pytest.mark.parametrize(
    "loss", [{"estimator": "full"}, {"estimator": "topk", "top_k": 16}], ids=lambda x: x["estimator"]
)
def test_divergences_equal_the_cpu(inputs, loss):
    name = loss["estimator"]
    cpu = run(inputs, f"cpu-{name}", device="cpu", loss=loss)
    gpu = run(inputs, f"gpu-{name}", device="cuda", loss=loss)
    assert_close(gpu[0], cpu[0], keys=("loss", "loss/divergence", "grad_norm"))


@pytest.mark.parametrize("kind", dense.KINDS)
def test_the_fused_loss_in_bfloat16(kind):
    """Products of bfloat16 into float32, as on no CPU, against float64 on the same rounded inputs."""
    import torch

    from fire_megatron.losses.divergences import build_divergence
    from fire_megatron.losses.fused import OutputLayer, chunked_linear_loss
    from fire_megatron.losses.vocab_divergence import divergence

    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(shape, generator=generator) for shape in ((70, 64), (500, 64), (70, 96), (500, 96))]
    hidden, weight, theirs, their_weight = (x.mul(0.4).bfloat16().cuda() for x in draw)
    hidden.requires_grad_(), weight.requires_grad_()
    teacher, built = OutputLayer(their_weight), build_divergence(kind, **dense.KINDS[kind])

    def token_loss(logits, part):
        value = divergence(logits, teacher.logits(theirs[part]), kind=built, group=None, reuse_logits=True)
        return value.sum(), value[None]

    loss, _ = chunked_linear_loss(hidden, weight, token_loss, chunk_tokens=32)
    loss.backward()
    exact = [x.detach().double().cpu().requires_grad_() for x in (hidden, weight)]
    logits = exact[0] @ exact[1].t(), theirs.double().cpu() @ their_weight.double().cpu().t()
    expected = dense.divergence(kind, *map(dense.log_softmax, logits), **dense.KINDS[kind]).sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for ours, reference in zip((hidden, weight), exact, strict=True):
        error = (ours.grad.double().cpu() - reference.grad).abs().max()
        assert error <= 8e-3 * reference.grad.abs().max()  # bfloat16's, of the gradient of logits and of the result
