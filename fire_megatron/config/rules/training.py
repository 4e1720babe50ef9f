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


_MOST_ANSWERS = 2**22
"""Of a step: every rank keeps a few numbers of each."""


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
    if answers > _MOST_ANSWERS:
        yield RecipeProblem(
            "rollout.prompts_per_step",
            f"{recipe.rollout.prompts_per_step} x samples_per_prompt {recipe.rollout.samples_per_prompt} are {answers} "
            f"answers a step, more than {_MOST_ANSWERS}; lower one of them",
        )
    if recipe.optimizer.mini_batches > answers:
        yield RecipeProblem(
            "optimizer.mini_batches",
            f"{recipe.optimizer.mini_batches} updates from {answers} answers a step "
            "(rollout.prompts_per_step x samples_per_prompt); lower it",
        )
    once = recipe.optimizer.mini_batches == 1
    if once and recipe.loss.estimator == "sampled" and not recipe.loss.is_default("clip"):
        yield RecipeProblem(
            "loss.clip",
            "has no effect with one update from each step's answers, where new and old probabilities are the same; "
            "leave it out, or raise optimizer.mini_batches",
        )
    if recipe.optimizer.warmup_steps > recipe.run.steps:
        yield RecipeProblem(
            "optimizer.warmup_steps",
            f"{recipe.optimizer.warmup_steps} exceeds run.steps, {recipe.run.steps}, so the rate would never reach "
            "optimizer.lr; lower it",
        )


def label_key(facts: Facts) -> Iterator[RecipeProblem]:
    """It is read of rows whose file gives no label."""
    chosen = not facts.recipe.data.is_default("label_key")
    if chosen and all(source.label is not None for source in facts.sources.values()):
        yield RecipeProblem(
            "data.label_key", "has no effect, since every file is given a label; leave it out, or the labels"
        )


def without_effect(facts: Facts) -> Iterator[str]:
    """What to tell people of keys of which a run of this length, or on this machine, makes nothing. They are no
    mistakes: one recipe serves short trials and machines without a GPU as well."""
    recipe, steps = facts.recipe, facts.recipe.run.steps
    for key, every in (("checkpoint.every", recipe.checkpoint.every), ("evaluation.every", recipe.evaluation.every)):
        if every > steps:
            yield f"{key} is {every} and run.steps {steps}, so it has no effect"
    if facts.machine and facts.machine.kind == "cpu":
        keys = [role.at("layer_spec") for role in facts.roles.values() if role.config.layer_spec == "local"]
        keys += [] if recipe.rollout.is_default("cuda_graphs") else ["rollout.cuda_graphs"]
        keys += [] if recipe.metrics.is_default("gpu_interval") else ["metrics.gpu_interval"]
        if keys:
            yield f"without a GPU, {' and '.join(keys)} {'have' if len(keys) > 1 else 'has'} no effect"
