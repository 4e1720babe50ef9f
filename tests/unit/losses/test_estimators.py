"""The sampled policy gradient: values, gradients, clipping, importance correction."""

import pytest
import torch

from fire_megatron.losses.estimators import importance_weights, sampled_policy_gradient


def case(shape=(64,), spread=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = -torch.rand(shape, generator=generator) * 3
    noise = [torch.randn(shape, generator=generator) * spread for _ in range(3)]
    return {
        "log_prob": base.clone().requires_grad_(),
        "old_log_prob": base + noise[0],
        "teacher_log_prob": base + noise[1],
        "rollout_log_prob": base + noise[0] + 0.2 * noise[2],
        "weight": torch.rand(shape, generator=generator) + 0.5,
    }


def loss_of(inputs, **options):
    inputs = {**inputs, **options}
    return sampled_policy_gradient(inputs.pop("log_prob"), **inputs)


@pytest.mark.parametrize("shape", [(64,), (4, 16), (0,)])
def test_equals_the_formula(shape):
    inputs = case(shape)
    result = loss_of(inputs, clip=0.1, importance_high=1.1)
    present, old = inputs["log_prob"].double(), inputs["old_log_prob"].double()
    advantage = inputs["weight"].double() * (inputs["teacher_log_prob"].double() - old)
    ratio = (present - old).exp()
    surrogate = torch.minimum(advantage * ratio, advantage * ratio.clamp(0.9, 1.1))
    importance = (old - inputs["rollout_log_prob"].double()).exp().clamp_max(1.1)
    torch.testing.assert_close(result.loss.double(), -importance * surrogate, rtol=1e-5, atol=1e-6)
    assert result.loss.dtype == torch.float32 and result.loss.shape == shape


def test_gradient_of_the_first_update_is_minus_the_weighted_advantage():
    inputs = case() | {"old_log_prob": None, "rollout_log_prob": None}
    result = loss_of(inputs)
    result.loss.sum().backward()
    expected = -inputs["weight"] * (inputs["teacher_log_prob"] - inputs["log_prob"].detach())
    torch.testing.assert_close(inputs["log_prob"].grad, expected)
    assert not result.clipped.any() and (result.ratio == 1).all() and (result.approx_kl == 0).all()


def test_no_old_log_prob_equals_passing_the_present_ones():
    inputs = case()
    implicit = loss_of(inputs, old_log_prob=None)
    explicit = loss_of(inputs, old_log_prob=inputs["log_prob"].detach())
    assert torch.equal(implicit.loss, explicit.loss)


def test_teacher_equal_to_student_gives_no_loss_and_no_gradient():
    inputs = case()
    inputs["teacher_log_prob"] = inputs["log_prob"].detach().clone()
    result = loss_of(inputs, old_log_prob=None)
    result.loss.sum().backward()
    assert (result.loss == 0).all() and (inputs["log_prob"].grad == 0).all()


@pytest.mark.parametrize(
    ("shift", "advantage", "flat"),
    [(0.5, 1.0, True), (0.5, -1.0, False), (-0.5, 1.0, False), (-0.5, -1.0, True), (0.1, 1.0, False)],
)
def test_clipping_is_pessimistic_on_both_sides(shift, advantage, flat):
    # The gradient stops only where the ratio has already gone too far in the direction that the advantage rewards.
    log_prob = torch.tensor([-1.0 + shift], requires_grad=True)
    old = torch.tensor([-1.0])
    result = sampled_policy_gradient(
        log_prob, teacher_log_prob=old + advantage, rollout_log_prob=None, weight=torch.ones(1), old_log_prob=old
    )
    result.loss.sum().backward()
    assert bool(result.clipped) is flat and (log_prob.grad == 0).item() is flat


def test_only_log_prob_has_a_gradient():
    inputs = {name: value.detach().requires_grad_() for name, value in case().items()}
    loss_of(inputs).loss.sum().backward()
    assert [name for name, value in inputs.items() if value.grad is not None] == ["log_prob"]


def test_huge_log_ratios_stay_finite():
    inputs = case((4,))
    inputs["old_log_prob"] = torch.tensor([-1e4, 0.0, -500.0, -1.0])
    inputs["rollout_log_prob"] = torch.tensor([0.0, -1e4, -1.0, -500.0])
    for mode in ("truncate", "mask", "off"):
        inputs["log_prob"].grad = None
        result = loss_of(inputs, importance_mode=mode)
        result.loss.sum().backward()
        assert result.loss.isfinite().all() and inputs["log_prob"].grad.isfinite().all()


@pytest.mark.parametrize(
    ("mode", "weights", "corrected"),
    [
        ("truncate", [0.25, 0.5, 1.0, 2.0, 2.0], [False, False, False, False, True]),
        ("mask", [0.0, 0.5, 1.0, 2.0, 0.0], [True, False, False, False, True]),
        ("off", [1.0] * 5, [False] * 5),
    ],
)
def test_importance_modes(mode, weights, corrected):
    old = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64).log().requires_grad_()
    ratio, cut = importance_weights(old, torch.zeros_like(old), mode=mode, low=0.5 - 1e-9, high=2.0 + 1e-9)
    torch.testing.assert_close(ratio, torch.tensor(weights, dtype=torch.float64), rtol=1e-8, atol=0)
    assert cut.tolist() == corrected
    assert not ratio.requires_grad


def test_importance_enters_the_loss_and_its_gradient():
    inputs = case()
    plain, corrected = (loss_of(inputs, importance_mode=mode) for mode in ("off", "truncate"))
    torch.testing.assert_close(corrected.loss, plain.loss * corrected.importance)
    (gradient,) = torch.autograd.grad(corrected.loss.sum(), inputs["log_prob"])
    (without,) = torch.autograd.grad(plain.loss.sum(), inputs["log_prob"])
    torch.testing.assert_close(gradient, without * corrected.importance)
    assert (corrected.importance != 1).any() and (plain.importance == 1).all()
