"""Applying hooks: rows that cannot train, no hooks at all, hooks of the user's own, bad recipes."""

import math
from dataclasses import replace

import pytest
import torch

from fire_megatron.config.errors import RecipeError
from fire_megatron.config.loss import HookConfig, LossConfig
from fire_megatron.fire import hooks as registry
from fire_megatron.fire.apply import apply_hooks
from fire_megatron.fire.batch import Selection
from fire_megatron.fire.hooks import build_hooks, register_hook
from fire_megatron.fire.statistics import row_means
from fire_megatron.metrics.values import Mean, Sum, reduce_metrics
from fire_megatron.parallel.reducer import Reducer

BOTH = (HookConfig("filter"), HookConfig("reweight"))


def run(batch, configs, micro_batch_size=1):
    return apply_hooks(batch, build_hooks(configs), reducer=Reducer(), micro_batch_size=micro_batch_size)


@pytest.fixture
def unregister():
    """Forget hooks that a test registers."""
    before = dict(registry._REGISTRY)
    yield
    registry._REGISTRY.clear()
    registry._REGISTRY.update(before)


def test_no_hooks_is_plain_distillation(random_batch):
    batch = random_batch()
    selection = run(batch, [])
    assert selection.keep_B.all() and (selection.weight_BR[batch.mask_BR] == 1).all()
    assert selection.metrics["fire/keep_ratio"] == Mean(12, 12)
    assert selection.metrics["fire/token_weight_mean"].result == 1
    assert selection.metrics["teacher/math/rows"].value + selection.metrics["teacher/code/rows"].value == 12


def test_the_default_recipe_filters_then_reweights(random_batch):
    batch = random_batch(40)
    assert LossConfig().hooks == BOTH
    metrics = run(batch, BOTH).metrics
    assert {
        "fire/keep_ratio", "fire/threshold/math", "fire/threshold/code", "fire/confidence", "fire/confusion",
        "fire/token_weight_mean", "fire/token_weight_min", "fire/token_weight_max", "fire/dropped/empty",
        "fire/dropped/nonfinite", "fire/dropped/below_threshold", "fire/dropped/truncated",
        "teacher/math/rows", "teacher/math/keep_ratio", "teacher/math/nonfinite",
        "teacher/code/rows", "teacher/code/keep_ratio", "teacher/code/nonfinite",
    } == set(metrics)  # fmt: skip
    assert all(isinstance(value, float) for value in reduce_metrics(metrics, group=None).values())


@pytest.mark.parametrize("configs", [[], BOTH], ids=["no hooks", "both"])
def test_empty_rows_are_always_dropped_and_change_nothing_for_others(random_batch, configs):
    batch = random_batch(20)
    mask = batch.mask_BR.clone()
    mask[[0, 7]] = False
    # An empty response must not get the best score, which 0 would be.
    selection = run(replace(batch, mask_BR=mask), configs)
    assert [selection.reason[i] for i in (0, 7)] == ["empty"] * 2 and not selection.keep_B[[0, 7]].any()
    assert selection.metrics["fire/dropped/empty"] == Sum(2.0)
    rest = torch.tensor([i for i in range(20) if i not in (0, 7)])
    without = replace(batch, **{k: v[rest] for k, v in vars(batch).items() if torch.is_tensor(v)})
    reference = run(without, configs)
    assert torch.equal(selection.keep_B[rest], reference.keep_B)
    assert torch.equal(selection.weight_BR[rest], reference.weight_BR)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("table", ["teacher_logp_BR", "teacher_entropy_BR", "student_entropy_BR"])
def test_rows_with_scores_that_are_not_finite_are_dropped_and_poison_nothing(random_batch, table, value):
    batch = random_batch(20)
    broken = getattr(batch, table).clone()
    broken[3, 0] = value
    selection = run(replace(batch, **{table: broken}), BOTH)
    assert selection.reason[3] == "nonfinite" and selection.metrics["fire/dropped/nonfinite"] == Sum(1.0)
    mask = batch.mask_BR.clone()
    mask[3] = False
    reference = run(replace(batch, mask_BR=mask), BOTH)
    assert torch.equal(selection.keep_B, reference.keep_B)
    assert torch.equal(selection.weight_BR, reference.weight_BR)
    assert selection.weight_BR.isfinite().all()


def test_padding_may_hold_anything(random_batch):
    batch = random_batch(20)
    tables = {
        name: torch.where(batch.mask_BR, getattr(batch, name), float("nan"))
        for name in ("teacher_logp_BR", "teacher_entropy_BR", "student_entropy_BR")
    }
    clean, dirty = run(batch, BOTH), run(replace(batch, **tables), BOTH)
    assert torch.equal(clean.keep_B, dirty.keep_B) and torch.equal(clean.weight_BR, dirty.weight_BR)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (4, 0)])
@pytest.mark.parametrize("scope", ["global", "microbatch"])
def test_no_rows_or_only_empty_ones(random_batch, shape, scope):
    batch = random_batch(4, 5)
    tables = {
        k: v[: shape[0], : shape[1]] if v.dim() == 2 else v[: shape[0]]
        for k, v in vars(batch).items()
        if torch.is_tensor(v)
    }
    hooks = [HookConfig(name, scope=scope) for name in ("filter", "reweight")]
    selection = run(replace(batch, **tables), hooks)
    assert selection.weight_BR.shape == shape and not selection.keep_B.any()
    assert selection.reason == ("empty",) * shape[0]
    assert not any(math.isnan(value) for value in reduce_metrics(selection.metrics, group=None).values())


def test_the_first_reason_stays(random_batch):
    batch = random_batch(3)
    selection = Selection(torch.ones(3).bool(), torch.ones(3, 9), (None,) * 3)
    selection = selection.drop(torch.tensor([True, False, False]), "first").drop(torch.ones(3).bool(), "second")
    assert selection.reason == ("first", "second", "second") and not selection.keep_B.any()
    assert len(batch) == 3


def test_a_hook_of_the_users_own(random_batch, unregister):
    """What a module listed under run.plugins contains."""

    @register_hook("drop_short")
    def drop_short(min_tokens: int = 3):
        def hook(batch, selection, reducer):
            lengths_B = batch.mask_BR.sum(-1)
            mean = reducer.sum(lengths_B.sum()) / reducer.sum(torch.tensor(len(batch)))
            selection = selection.drop(lengths_B < min_tokens, "short")
            return selection.report({"length/all": Mean(float(mean), 1)})

        return hook

    batch = random_batch(20)
    short = batch.mask_BR.sum(-1) < 5
    configs = [HookConfig("drop_short", min_tokens=5), HookConfig("reweight")]
    selection = run(batch, configs)
    assert torch.equal(selection.keep_B, ~short)
    assert selection.metrics["fire/dropped/short"] == Sum(float(short.sum()))
    assert selection.metrics["length/all"].result == pytest.approx(float(batch.mask_BR.sum()) / 20)
    # The built-in hook after it saw only the rows that it kept.
    assert selection.metrics["fire/token_weight_mean"].result == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("scope", ["global", "microbatch"])
def test_details_are_what_the_decisions_came_from(random_batch, scope):
    batch = random_batch(20)
    options = {"alpha": 2.0, "beta": 0.5, "scope": scope}
    selection = run(batch, [HookConfig("filter", scope=scope), HookConfig("reweight", **options)], 5)
    assert set(selection.details) == {"threshold", "confidence", "confusion"}
    details = selection.details
    means_B = row_means(batch.teacher_logp_BR, batch.mask_BR)
    assert torch.equal(selection.keep_B, means_B >= details["threshold"])
    product_BR = (1 + 2 * details["confidence"]) * (1 + 0.5 * details["confusion"])
    scale_BR = torch.where(batch.mask_BR, selection.weight_BR / product_BR, 0)
    sizes = [5] * 4 if scope == "microbatch" else [20]
    for scale, mask in zip(scale_BR.split(sizes), batch.mask_BR.split(sizes), strict=True):
        assert torch.allclose(scale[mask], scale[mask][0]), "one mean over all tokens that are seen together"


def test_a_hook_may_scale_weights_and_forget_earlier_metrics(random_batch, unregister):
    @register_hook("halve")
    def halve():
        def hook(batch, selection, reducer):
            return Selection(selection.keep_B, selection.weight_BR / 2, selection.reason)

        return hook

    batch = random_batch(20)
    selection = run(batch, [HookConfig("filter"), HookConfig("halve")])
    assert (selection.weight_BR[batch.mask_BR] == 0.5).all()
    assert "fire/threshold/math" in selection.metrics and "threshold" in selection.details


WRONG = {
    "nothing": (lambda b, s: None, "returned None; a hook returns a Selection"),
    "a table": (lambda b, s: s.weight_BR, r"returned tensor\(.*a hook returns a Selection"),
    "dropped rows": (lambda b, s: replace(s, keep_B=torch.ones_like(s.keep_B)), "kept that were dropped before"),
    "a weight a row": (lambda b, s: s.reweight(s.weight_BR[:, :1]), r"weights have shape \(\d+, 1\), not \(\d+, 9\)"),
    "such weights by hand": (lambda b, s: replace(s, weight_BR=s.weight_BR[:, :1]), r"weights of shape \(\d+, 1\)"),
    "weights of a row": (lambda b, s: replace(s, weight_BR=s.weight_BR[:, 0]), "it must be float32"),
    "rows by token": (lambda b, s: s.drop(b.mask_BR[:, :1], "x"), "must be bool, one a row"),
    "rows by number": (lambda b, s: s.drop(torch.tensor([0, 1]), "x"), "must be bool, one a row"),
    "rows brought back in place": (lambda b, s: (s.keep_B.fill_(True), s)[1], "kept that were dropped"),
    "rows as numbers": (lambda b, s: replace(s, keep_B=s.keep_B.long()), "keep_B is torch.int64"),
    "fewer reasons": (lambda b, s: replace(s, reason=()), "with 0 reasons"),
    "bare metrics": (lambda b, s: s.report({"x": 1.0}), "metric 'x' is 1.0; give a Sum"),
    "a detail of another shape": (lambda b, s: s.report({}, x=torch.zeros(3, 3, 3)), "detail 'x' has shape"),
    "weights that are no numbers": (lambda b, s: s.reweight(s.weight_BR / 0 * 0), "weights that are not finite"),
    "an error of its own": (lambda b, s: {}["x"], r"KeyError: 'x' \(.*test_apply.py:\d+\)"),
    "an assertion": (lambda b, s: pytest.fail("no") if len(b) < 0 else torch.zeros(2)[5], "IndexError: "),
}


@pytest.mark.parametrize("scope", ["global", "microbatch"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_hook_that_gives_back_something_else_is_named(random_batch, unregister, wrong, scope):
    decide, message = WRONG[wrong]

    @register_hook("wrong")
    def make():
        def hook(batch, selection, reducer):
            return decide(batch, selection)

        hook.scope = scope
        return hook

    with pytest.raises(RecipeError, match=rf"(?s)^loss\.hooks\.1: .*{message}"):
        run(random_batch(40), [HookConfig("filter", scope=scope), HookConfig("wrong")], 20)


def test_what_a_device_or_another_rank_does_stays_what_it_is(random_batch, unregister):
    @register_hook("lost")
    def lost():
        def hook(batch, selection, reducer):
            raise RuntimeError("Connection closed by peer")

        return hook

    with pytest.raises(RuntimeError, match="^Connection closed by peer") as error:
        run(random_batch(), [HookConfig("lost")])
    assert error.value.__notes__ == ["in loss.hooks.0"]


@pytest.mark.parametrize("made", [None, 3, "filter"])
def test_a_factory_that_returns_no_hook(unregister, made):
    register_hook("made")(lambda: made)
    with pytest.raises(RecipeError, match=rf"loss\.hooks\.0 \(made\): its factory returned {made!r}, which cannot be"):
        build_hooks([HookConfig("made")])


def test_whose_scores_are_not_finite(random_batch):
    """A row that the student's own entropies spoil is not the teacher's."""
    batch = random_batch(20)
    tables = {name: getattr(batch, name).clone() for name in ("teacher_logp_BR", "student_entropy_BR")}
    tables["teacher_logp_BR"][[3, 5], 0] = math.nan
    tables["student_entropy_BR"][[5, 8], 0] = math.nan
    metrics = run(replace(batch, **tables), BOTH).metrics
    blamed = {name: metrics[f"teacher/{name}/nonfinite"].value for name in batch.teacher_names}
    assert blamed == {name: float(batch.teacher_B[3] == i) for i, name in enumerate(batch.teacher_names)}
    assert metrics["fire/dropped/nonfinite"] == Sum(3.0)


@pytest.mark.parametrize(("options", "message"), [({"min_token": 3}, "min_token"), ({"min_tokens": 0}, "at least 1")])
def test_options_that_a_users_hook_does_not_take(unregister, options, message):
    @register_hook("drop_short")
    def drop_short(min_tokens: int = 3):
        if min_tokens < 1:
            raise ValueError("min_tokens must be at least 1")
        return lambda batch, selection, reducer: selection

    with pytest.raises(RecipeError, match=rf"loss\.hooks\.0 \(drop_short\): .*{message}"):
        build_hooks([HookConfig("drop_short", **options)])


def test_a_name_is_registered_once(unregister):
    with pytest.raises(RecipeError, match="'filter' is already registered"):
        register_hook("filter")(lambda: None)
