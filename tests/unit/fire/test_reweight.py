"""The reweight hook."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fire_megatron.config.loss import HookConfig
from fire_megatron.fire.apply import apply_hooks
from fire_megatron.fire.hooks import build_hooks
from fire_megatron.parallel.reducer import Reducer


def run(batch, *hooks, micro_batch_size=1):
    built = build_hooks([HookConfig(name, **options) for name, options in hooks])
    return apply_hooks(batch, built, reducer=Reducer(), micro_batch_size=micro_batch_size)


def expected_weights(batch, counted, alpha, beta, group_by):
    mask = batch.mask_BR.numpy()
    h_t, h_s = batch.teacher_entropy_BR.double().numpy(), batch.student_entropy_BR.double().numpy()
    weight = np.zeros_like(h_t)
    groups = batch.teacher_B.numpy() if group_by == "teacher" else np.zeros(len(batch))
    for group in np.unique(groups):
        own = mask & (groups == group)[:, None]
        confidence, confusion = 1 - h_t / h_t[own].max(), h_s / h_s[own].max()
        weight = np.where(own, (1 + alpha * confidence) * (1 + beta * confusion), weight)
    return weight / weight[counted].mean()


@pytest.mark.parametrize("group_by", ["teacher", "batch"])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 2.0), (0.0, 1.0), (0.0, 0.0)])
@pytest.mark.parametrize("normalise_over", ["kept", "all"])
def test_weights_after_the_filter(random_batch, group_by, alpha, beta, normalise_over):
    batch = random_batch(40)
    options = {"alpha": alpha, "beta": beta}
    if alpha or beta:  # otherwise they have no effect, which is refused
        options |= {"group_by": group_by, "normalise_over": normalise_over}
    selection = run(batch, ("filter", {"percentile": 40}), ("reweight", options))
    kept = (batch.mask_BR & selection.keep_B[:, None]).numpy()
    counted = kept if normalise_over == "kept" else batch.mask_BR.numpy()
    expected = expected_weights(batch, counted, alpha, beta, group_by)
    weights = selection.weight_BR.double().numpy()
    np.testing.assert_allclose(weights[kept], expected[kept], rtol=1e-5)
    assert (weights[~batch.mask_BR.numpy()] == 0).all()
    metrics = selection.metrics
    assert metrics["fire/token_weight_mean"].result == pytest.approx(expected[kept].mean(), rel=1e-5)
    assert metrics["fire/token_weight_min"].result == pytest.approx(expected[kept].min(), rel=1e-5)
    assert metrics["fire/token_weight_max"].result == pytest.approx(expected[kept].max(), rel=1e-5)
    if normalise_over == "kept":
        assert weights[kept].mean() == pytest.approx(1, abs=1e-6)


def test_the_other_order_gives_the_same_rows_and_the_same_weights_up_to_their_mean(random_batch):
    batch = random_batch(40)
    hooks = ("filter", {"percentile": 40}), ("reweight", {})
    forth, back = run(batch, *hooks), run(batch, *hooks[::-1])
    assert torch.equal(forth.keep_B, back.keep_B)
    kept = batch.mask_BR & forth.keep_B[:, None]
    ratio = forth.weight_BR[kept] / back.weight_BR[kept]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    # Normalised over what was kept at the time, that is everything.
    torch.testing.assert_close(back.weight_BR[batch.mask_BR].mean(), torch.tensor(1.0))


def test_alone_it_keeps_every_row(random_batch):
    selection = run(random_batch(), ("reweight", {}))
    assert selection.keep_B.all()
    assert selection.metrics["fire/token_weight_mean"].result == pytest.approx(1, abs=1e-6)


def test_twice_multiplies(random_batch):
    batch = random_batch()
    once, twice = run(batch, ("reweight", {})), run(batch, ("reweight", {}), ("reweight", {}))
    squared = once.weight_BR.double() ** 2
    torch.testing.assert_close(twice.weight_BR.double(), squared / squared[batch.mask_BR].mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("certain", ["teacher_entropy_BR", "student_entropy_BR", "both"])
def test_zero_entropy_everywhere_divides_by_nothing(random_batch, certain):
    batch = random_batch()
    for name in ("teacher_entropy_BR", "student_entropy_BR"):
        if certain in (name, "both"):
            batch = replace(batch, **{name: torch.zeros_like(batch.mask_BR, dtype=torch.float32)})
    selection = run(batch, ("reweight", {}))
    assert selection.weight_BR.isfinite().all()
    # A teacher that never hesitates is fully confident; a student that never does is not confused.
    if certain != "student_entropy_BR":
        assert selection.metrics["fire/confidence"].result == 1
    if certain != "teacher_entropy_BR":
        assert selection.metrics["fire/confusion"].result == 0
    if certain == "both":
        assert (selection.weight_BR[batch.mask_BR] == 1).all()


def test_microbatch_scope(random_batch):
    batch = random_batch()
    together = run(batch, ("reweight", {"scope": "microbatch"}), micro_batch_size=5)
    parts = [run(batch.rows(slice(i, i + 5)), ("reweight", {})) for i in range(0, 12, 5)]
    assert torch.equal(together.weight_BR, torch.cat([p.weight_BR for p in parts]))


def test_global_weights_do_not_depend_on_row_order_padding_or_micro_batch(random_batch):
    batch = random_batch(40)
    order = torch.randperm(40)
    wide = {
        k: torch.nn.functional.pad(v[order], (0, 5)) if v.dim() == 2 else v[order]
        for k, v in vars(batch).items()
        if torch.is_tensor(v)
    }
    hooks = ("filter", {}), ("reweight", {})
    here = run(batch, *hooks)
    there = run(replace(batch, **wide), *hooks, micro_batch_size=7)
    assert torch.equal(here.keep_B[order], there.keep_B)
    assert torch.equal(here.weight_BR[order], there.weight_BR[:, :9])  # to the bit
