"""Rules on checkpoints, and on what the models in them have to have in common."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fire_megatron.config.checkpoints import checkpoint_problem
from fire_megatron.config.errors import RecipeProblem
from fire_megatron.config.hf_config import used_vocabulary
from fire_megatron.config.rules.facts import Facts, Role


def checkpoints(facts: Facts) -> Iterator[RecipeProblem]:
    for key, role in facts.roles.items():
        text = None if key in facts.elsewhere else checkpoint_problem(Path(role.config.checkpoint))
        text = text or facts.unreadable.get(key)
        if text:
            yield RecipeProblem(role.at("checkpoint"), text)


def layer_spec(role: Role) -> Iterator[RecipeProblem]:
    if role.config.layer_spec == "te" and role.no_engine:
        text = f"te needs Transformer Engine on a GPU and {role.no_engine}; use auto or local"
        yield RecipeProblem(role.at("layer_spec"), text)


def positions(facts: Facts) -> Iterator[RecipeProblem]:
    recipe, prompt = facts.recipe, facts.recipe.data.max_prompt_tokens
    needs = {"rollout": recipe.rollout.max_new_tokens}
    if recipe.evaluation.prompts:
        needs["evaluation"] = recipe.evaluation.max_new_tokens
    if not facts.shapes:
        return
    reach, role = min((shape.max_positions, key) for key, shape in facts.shapes.items())
    for section, answer in needs.items():
        if prompt + answer > reach:
            yield RecipeProblem(
                f"{section}.max_new_tokens",
                f"{answer} after prompts of up to {prompt} tokens (data.max_prompt_tokens) exceeds the {reach} "
                f"positions of {role}; lower one of them",
            )


def vocabulary(role: Role) -> Iterator[RecipeProblem]:
    if role.shape and role.tokenizer and role.tokenizer.vocab_size > role.shape.vocab_size:
        yield RecipeProblem(
            role.at("checkpoint"),
            f"its vocabulary of {role.shape.vocab_size} does not hold the tokenizer's {role.tokenizer.vocab_size} "
            "tokens; give a checkpoint of the family that the tokenizer is of",
        )


def tokenizers(facts: Facts) -> Iterator[RecipeProblem]:
    for key, other in facts.fingerprints.items():
        if other != facts.fingerprints["student"]:
            yield RecipeProblem(
                f"{key}.checkpoint",
                f"its tokenizer differs from the student's ({facts.roles[key].config.checkpoint} against "
                f"{facts.recipe.student.checkpoint}); log-probabilities can only be compared token by token when both "
                "use one vocabulary",
            )


def top_k(facts: Facts) -> Iterator[RecipeProblem]:
    loss = facts.recipe.loss
    if loss.estimator != "topk" or not facts.shapes:
        return
    used = used_vocabulary(facts.shapes)
    if loss.top_k > used:
        yield RecipeProblem("loss.top_k", f"{loss.top_k} exceeds the vocabulary of {used}; lower it")
