"""Rules on the loss, its hooks and counts."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from fire_megatron.config.errors import RecipeProblem
from fire_megatron.config.loss import BUILTIN_HOOKS
from fire_megatron.config.messages import nearest
from fire_megatron.config.rules.facts import Facts
from fire_megatron.config.schema import Recipe


def sampling_notes(recipe: Recipe) -> Iterator[str]:
    """What to know of a recipe that trains another distribution than it samples from."""
    rollout, loss = recipe.rollout, recipe.loss
    if loss.estimator != "sampled" or (rollout.temperature == loss.temperature and rollout.top_p == 1):
        return
    parts = [
        f"rollout.{key} is {value:g}" + (f" and loss.temperature {loss.temperature:g}" if key == "temperature" else "")
        for key, value, other in (("temperature", rollout.temperature, loss.temperature), ("top_p", rollout.top_p, 1))
        if value != other
    ]
    if loss.importance.mode == "off":
        effect = (
            "with loss.importance.mode off nothing corrects for that, so the gradient is not that of the reverse KL"
        )
    else:
        effect = (
            "importance correction takes the difference for one between engine and trainer, and cuts weights above "
            f"loss.importance.high ({loss.importance.high:g})"
        )
    same = f"loss.temperature={rollout.temperature:g}" if rollout.temperature else "rollout.temperature=1"
    advice = [same] if rollout.temperature != loss.temperature else []
    advice += ["rollout.top_p=1"] if rollout.top_p != 1 else []
    yield (
        f"NOTE: {' and '.join(parts)}, so answers are not samples of the distribution that estimator sampled trains: "
        f"{effect}; {' and '.join(advice)} {'make' if advice[1:] else 'makes'} them one distribution"
    )


def hook_names(facts: Facts) -> Iterator[RecipeProblem]:
    known = facts.hooks if facts.hooks is not None else None if facts.recipe.run.plugins else BUILTIN_HOOKS
    for i, hook in enumerate(facts.recipe.loss.hooks):
        if known is not None and hook.name not in known:
            close = nearest(hook.name, known)
            yield RecipeProblem(
                f"loss.hooks.{i}.name",
                f"no hook is named {hook.name!r}; {f'did you mean {close}? There' if close else 'there'} are "
                f"{', '.join(sorted(known))}; a hook of your own needs its module in run.plugins",
            )


def trackers(facts: Facts) -> Iterator[RecipeProblem]:
    for i, name in () if facts.elsewhere else enumerate(facts.recipe.metrics.trackers):
        if importlib.util.find_spec(name) is None:
            yield RecipeProblem(
                f"metrics.trackers.{i}", f"{name} is not installed; pip install -e '.[trackers]', or leave it out"
            )


def micro_batches(facts: Facts) -> Iterator[RecipeProblem]:
    tokens, hooks = facts.recipe.optimizer.micro_batch_tokens, facts.recipe.loss.hooks
    scopes = facts.scopes or [hook.options.get("scope") for hook in hooks]
    for i, scope in enumerate(scopes):
        if tokens and scope == "microbatch":
            key, name, other = f"loss.hooks.{i}", f"the scope of {hooks[i].name}, ", ""
            if "scope" in hooks[i].options:
                key, name, other = f"{key}.scope", "", "use 'global', or "
            yield RecipeProblem(
                key,
                f"{name}'microbatch', takes its statistics over micro-batches of optimizer.micro_batch_size answers, "
                f"and optimizer.micro_batch_tokens is {tokens}; {other}set micro_batch_size instead",
            )


def counts(facts: Facts) -> Iterator[RecipeProblem]:
    recipe = facts.recipe
    answers = recipe.rollout.prompts_per_step * recipe.rollout.samples_per_prompt
    if recipe.optimizer.mini_batches > answers:
        yield RecipeProblem(
            "optimizer.mini_batches",
            f"{recipe.optimizer.mini_batches} updates from {answers} answers a step "
            "(rollout.prompts_per_step x samples_per_prompt); lower it",
        )
    if recipe.evaluation.every and not (recipe.evaluation.prompts or recipe.evaluation.benchmarks):
        yield RecipeProblem(
            "evaluation.every",
            f"{recipe.evaluation.every}, but evaluation.prompts and evaluation.benchmarks name no file; give one",
        )
