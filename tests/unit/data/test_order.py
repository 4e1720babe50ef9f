"""The order of prompts: complete epochs, and a pure function of seed and step."""

from hypothesis import given
from hypothesis import strategies as st

from fire_megatron.data.order import PromptOrder

SIZES = {"num_prompts": st.integers(1, 50), "per_step": st.integers(1, 60), "seed": st.integers(0, 2**63 - 1)}


def _places(order: PromptOrder, first: int, steps: int) -> list[int]:
    return [index for step in range(first, first + steps) for index in order.batch(step)]


@given(**SIZES, shuffle=st.booleans())
def test_every_prompt_once_an_epoch(num_prompts, per_step, seed, shuffle):
    order = PromptOrder(num_prompts, per_step, seed=seed, shuffle=shuffle)
    places = _places(order, 0, -(-3 * num_prompts // per_step))
    for epoch in range(3):
        assert sorted(places[epoch * num_prompts : (epoch + 1) * num_prompts]) == list(range(num_prompts))


@given(**SIZES, first=st.integers(0, 10**6))
def test_a_resumed_order_goes_on_where_it_was(num_prompts, per_step, seed, first):
    """Only the step number is needed, also after other steps were asked for in any order."""
    used = PromptOrder(num_prompts, per_step, seed=seed, shuffle=True)
    _places(used, 0, 3)
    fresh = PromptOrder(num_prompts, per_step, seed=seed, shuffle=True)
    assert _places(used, first, 2) == _places(fresh, first, 2)


def test_epochs_and_seeds_differ():
    order = PromptOrder(100, 100, seed=1234, shuffle=True)
    other = PromptOrder(100, 100, seed=1235, shuffle=True)
    epochs = [tuple(o.batch(step)) for o in (order, other) for step in range(3)]
    assert len(set(epochs)) == 6


def test_unshuffled_is_file_order_over_and_over():
    order = PromptOrder(3, 2, seed=0, shuffle=False)
    assert _places(order, 0, 3) == [0, 1, 2, 0, 1, 2]


def test_the_order_is_fixed_for_good():
    """A checkpoint of today must resume on the same prompts with the numpy of tomorrow."""
    assert PromptOrder(8, 8, seed=1234, shuffle=True).batch(0) == [7, 3, 0, 1, 4, 2, 5, 6]
