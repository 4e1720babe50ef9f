"""The filter hook."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fire_megatron.config.loss import HookConfig
from fire_megatron.fire.apply import apply_hooks
from fire_megatron.fire.hooks import build_hooks
from fire_megatron.metrics.values import Last, Mean, Sum
from fire_megatron.parallel.reducer import Reducer


def run(batch, micro_batch_size=1, **options):
    hooks = build_hooks([HookConfig("filter", **options)])
    return apply_hooks(batch, hooks, reducer=Reducer(), micro_batch_size=micro_batch_size)


def scores(batch):
    mask = batch.mask_BR.numpy()
    return (batch.teacher_logp_BR.double().numpy() * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize("q", [0, 20, 50, 99])
def test_each_teacher_has_its_own_percentile(random_batch, q):
    batch = random_batch(40)
    selection = run(batch, percentile=q)
    s, teacher = scores(batch), batch.teacher_B.numpy()
    for index, name in enumerate(batch.teacher_names):
        own = teacher == index
        threshold = np.percentile(s[own], q)
        assert selection.metrics[f"fire/threshold/{name}"].result == pytest.approx(threshold, abs=1e-8)
        assert (selection.keep_B.numpy()[own] == (s[own] >= threshold - 1e-9)).all()
    assert {r for r in selection.reason if r} == ({"below_threshold"} if q else set())
    assert [r is None for r in selection.reason] == selection.keep_B.tolist()


def test_a_harsher_teacher_does_not_lose_its_domain(random_batch):
    batch = random_batch(40)
    harsh = torch.where((batch.teacher_B == 1)[:, None], batch.teacher_logp_BR - 5, batch.teacher_logp_BR)
    batch = replace(batch, teacher_logp_BR=harsh)
    code = batch.teacher_B == 1
    published, ours = run(batch, percentile=50, group_by="batch"), run(batch, percentile=50)
    assert published.keep_B[code].float().mean() < 0.2 and published.metrics["fire/threshold/all"]
    assert 0.45 < ours.keep_B[code].float().mean() < 0.6


def test_a_row_at_the_threshold_stays(random_batch):
    batch = replace(random_batch(21), teacher_B=torch.zeros(21, dtype=torch.int64))
    for q in range(0, 100, 5):
        assert run(batch, percentile=q).keep_B.sum() == 21 - q * 20 // 100


def test_equal_rows_share_their_fate_whatever_the_padding(random_batch):
    # 0.1 + 0.2 + 0.3 rounds differently in another order: the sum must not.
    batch = random_batch(9, 6)
    row = torch.tensor([-0.1, -0.2, -0.3, -0.7, -1.1, -1.3])
    shuffled = torch.stack([row[torch.randperm(6)] for _ in range(9)])
    batch = replace(
        batch, teacher_B=torch.zeros(9, dtype=torch.int64), teacher_logp_BR=shuffled, mask_BR=torch.ones(9, 6).bool()
    )
    assert run(batch, percentile=50).keep_B.all()


def test_microbatch_scope_of_one_row_keeps_everything(random_batch):
    # The published scripts run so, which is why their filter never drops anything.
    selection = run(random_batch(), 1, scope="microbatch", percentile=50)
    assert selection.keep_B.all()
    assert all(isinstance(v, Mean) for k, v in selection.metrics.items() if k.startswith("fire/threshold/"))


@pytest.mark.parametrize("size", [3, 5, 12, 100])
def test_microbatch_scope_takes_each_micro_batch_by_itself(random_batch, size):
    batch = random_batch()
    together = run(batch, size, scope="microbatch", percentile=40)
    parts = [run(batch.rows(slice(i, i + size)), percentile=40) for i in range(0, 12, size)]
    assert torch.equal(together.keep_B, torch.cat([p.keep_B for p in parts]))
    thresholds = [p.metrics["fire/threshold/math"].value for p in parts if "fire/threshold/math" in p.metrics]
    assert together.metrics["fire/threshold/math"].result == pytest.approx(np.mean(thresholds))


def test_global_scope_does_not_depend_on_the_micro_batch_size(random_batch):
    batch = random_batch()
    results = [run(batch, size) for size in (1, 2, 5, 100)]
    assert all(torch.equal(r.keep_B, results[0].keep_B) and r.metrics == results[0].metrics for r in results)
    assert isinstance(results[0].metrics["fire/threshold/math"], Last)


def test_truncated_rows_are_recorded_and_dropped_only_on_request(random_batch):
    batch = random_batch(40)
    assert batch.truncated_B.any()
    assert run(batch, percentile=0).keep_B.all()
    selection = run(batch, percentile=0, drop_truncated=True)
    assert torch.equal(selection.keep_B, ~batch.truncated_B)
    assert selection.metrics["fire/dropped/truncated"] == Sum(float(batch.truncated_B.sum()))
    # Truncated rows do not set the threshold for the others either.
    rest = replace(batch, **{k: v[~batch.truncated_B] for k, v in vars(batch).items() if torch.is_tensor(v)})
    both = run(batch, percentile=30, drop_truncated=True)
    assert torch.equal(both.keep_B[~batch.truncated_B], run(rest, percentile=30).keep_B)
