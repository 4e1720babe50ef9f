"""Checks that take several sections, the files that a recipe names, or the launcher: a table of small functions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fire_megatron.config.checkpoints import checkpoint_problem, looked_in, read_json_object
from fire_megatron.config.errors import Problem, RecipeProblems
from fire_megatron.config.fp8 import fp8_problems
from fire_megatron.config.loss import BUILTIN_HOOKS
from fire_megatron.config.messages import nearest
from fire_megatron.config.roles import roles
from fire_megatron.config.schema import BenchmarkConfig, Recipe, RoleConfig, SourceConfig
from fire_megatron.config.spans import parse_span, span_problems


@dataclass(frozen=True)
class Context:
    """What a check may look at."""

    recipe: Recipe
    world_size: int | None
    """Ranks that the launcher started; None when that is not known, as in a dry run."""
    models: Mapping[str, Mapping[str, Any]]
    """``config.json`` of every role whose checkpoint has a readable one, by the role's key."""
    elsewhere: Mapping[str, Path] = field(default_factory=dict)
    """In a plan for another machine: by the role's key, a folder that has the architecture of a checkpoint which is not
    on this one."""

    @property
    def roles(self) -> dict[str, RoleConfig]:
        """Every role by its key: ``student``, ``teachers.math``."""
        return roles(self.recipe)

    @property
    def sources(self) -> dict[str, SourceConfig]:
        """Every file of prompts by its key."""
        train = {f"data.train.{i}": source for i, source in enumerate(self.recipe.data.train)}
        held_out = {f"evaluation.prompts.{i}": source for i, source in enumerate(self.recipe.evaluation.prompts)}
        return train | held_out

    @property
    def files(self) -> dict[str, SourceConfig | BenchmarkConfig]:
        """Every file of prompts or problems by its key."""
        benchmarks = {f"evaluation.benchmarks.{i}": file for i, file in enumerate(self.recipe.evaluation.benchmarks)}
        return self.sources | benchmarks

    def number(self, role: str, name: str) -> int | None:
        """A whole number of a role's ``config.json``; None when it is not there."""
        value = self.models.get(role, {}).get(name)
        return value if type(value) is int and value > 0 else None

    def experts(self, role: str) -> int | None:
        """Experts of a layer of a role's model; None when it has none. Newer transformers write another name."""
        return self.number(role, "num_experts") or self.number(role, "num_local_experts")


def check_recipe(recipe: Recipe, *, world_size: int | None, elsewhere: Mapping[str, Path] | None = None) -> None:
    """Check what one section alone cannot know, reading JSON files but no weights.

    Args:
        recipe: as loaded.
        world_size: ranks of the run; None skips the checks that need it.
        elsewhere: in a plan for another machine, folders with the architectures of checkpoints that are not on this
            one, by the role's key; this machine's files are not checked then.

    Raises:
        RecipeProblems: every problem found.
    """
    elsewhere = elsewhere or {}
    folders = {key: elsewhere.get(key, Path(role.checkpoint)) for key, role in roles(recipe).items()}
    found = {key: read_json_object(folder / "config.json") for key, folder in folders.items()}
    models = {key: values for key, values in found.items() if values is not None}
    context = Context(recipe, world_size, models, elsewhere)
    problems = [problem for check in CHECKS for problem in check(context)]
    if problems:
        raise RecipeProblems(problems)


def _labels(context: Context) -> Iterator[Problem]:
    """A label belongs to one teacher, and every label that the recipe gives has one."""
    owners: dict[str, str] = {}
    for name, teacher in context.recipe.teachers.items():
        for label in teacher.labels or (name,):
            if label in owners:
                both = "twice by it" if owners[label] == name else f"by teachers.{owners[label]} as well"
                yield Problem(
                    f"teachers.{name}.labels", f"{label!r} is claimed {both}; a label belongs to one teacher, once"
                )
            owners.setdefault(label, name)
    for key, source in context.sources.items():
        if source.label is not None and source.label not in owners:
            close = nearest(source.label, owners)
            advice = f"did you mean {close}?" if close else f"the labels with a teacher are {', '.join(sorted(owners))}"
            yield Problem(f"{key}.label", f"no teacher takes {source.label!r}; {advice}")


def _prompt_files(context: Context) -> Iterator[Problem]:
    for key, source in () if context.elsewhere else context.files.items():
        path = Path(source.path)
        if not path.exists():
            yield Problem(f"{key}.path", f"{path} does not exist{looked_in(path)}; correct the path")
        elif not path.is_file():
            yield Problem(f"{key}.path", f"{path} is a folder; give a file of prompts (JSON Lines or a JSON list)")
        elif not os.access(path, os.R_OK):
            yield Problem(f"{key}.path", f"{path} may not be read; change its permissions")


def _checkpoints(context: Context) -> Iterator[Problem]:
    for key, role in context.roles.items():
        text = None if key in context.elsewhere else checkpoint_problem(Path(role.checkpoint))
        if text:
            yield Problem(f"{key}.checkpoint", text)


def _tensor_parallel(context: Context) -> Iterator[Problem]:
    names = {
        "num_attention_heads": "heads",
        "num_key_value_heads": "key/value heads",
        "intermediate_size": "rows of the MLP",
    }
    for key, role in context.roles.items():
        tensor = role.parallel.tensor
        counts = {noun: context.number(key, name) for name, noun in names.items()}
        if context.experts(key):
            counts["rows of the MLP"] = context.number(key, "moe_intermediate_size")
        wrong = [f"{count} {noun}" for noun, count in counts.items() if count is not None and count % tensor]
        if wrong:
            yield Problem(
                f"{key}.parallel.tensor",
                f"{tensor} does not divide the model's {' nor its '.join(wrong)}; choose a number that divides "
                f"{' and '.join(str(count) for count in counts.values() if count is not None)}",
            )
        if role.parallel.sequence and tensor == 1:
            yield Problem(f"{key}.parallel.sequence", "true needs parallel.tensor above 1; leave it out (null)")


def _pipeline(context: Context) -> Iterator[Problem]:
    for key, role in context.roles.items():
        layers, stages = context.number(key, "num_hidden_layers"), role.parallel.pipeline
        if layers is not None and stages > layers:
            yield Problem(f"{key}.parallel.pipeline", f"{stages} stages for a model of {layers} layers; lower it")


def _context(context: Context) -> Iterator[Problem]:
    """How context ranks share keys and values is Transformer Engine's to choose; ranks and heads are other checks'."""
    for key, role in context.roles.items():
        chosen = role.megatron.get("cp_comm_type")
        if chosen is None:
            continue
        if role.parallel.context == 1:
            yield Problem(
                f"{key}.megatron.cp_comm_type",
                f"{chosen!r} has no effect, since {key}.parallel.context is 1; leave it out",
            )
        elif role.layer_spec == "local":
            yield Problem(
                f"{key}.megatron.cp_comm_type",
                f"{chosen!r} is read by Transformer Engine's layers and {key}.layer_spec is local; leave it out",
            )
        heads = context.number(key, "num_key_value_heads")
        ranks = role.parallel.tensor * role.parallel.context
        if chosen == "a2a" and heads is not None and heads % ranks:
            yield Problem(
                f"{key}.megatron.cp_comm_type",
                f"'a2a' shares out the model's {heads} key/value heads over tensor {role.parallel.tensor} x context "
                f"{role.parallel.context} = {ranks} ranks, which does not divide them; use 'p2p' or 'all_gather'",
            )


def _experts(context: Context) -> Iterator[Problem]:
    for key, role in context.roles.items():
        layout, experts = role.parallel, context.experts(key)
        if key in context.models and experts is None and layout.expert > 1:
            yield Problem(f"{key}.parallel.expert", f"{layout.expert}, but the model has no experts; leave it 1")
        if experts is not None and experts % layout.expert:
            yield Problem(
                f"{key}.parallel.expert",
                f"{layout.expert} does not divide the model's {experts} experts; choose a number that does",
            )
        if experts is not None and key == "student" and layout.tensor > 1 and layout.sequence is False:
            yield Problem(
                f"{key}.parallel.sequence",
                f"false, but experts train with parallel.tensor {layout.tensor} only with sequence parallelism; leave "
                "it out (null)",
            )
        copy = layout.tensor * layout.pipeline * layout.context
        ranks = None if context.world_size is None else parse_span(role.ranks, context.world_size).count
        if ranks is None or ranks < 1 or ranks % copy:
            continue  # nothing to say, or said by _spans
        stage = ranks // (layout.tensor * layout.pipeline)
        if stage % layout.expert:
            yield Problem(
                f"{key}.parallel.expert",
                f"{layout.expert} does not divide the {stage} ranks that share the experts of a pipeline stage "
                f"(context x data, of the role's {ranks} ranks); lower it or give it more ranks",
            )


def _spans(context: Context) -> Iterator[Problem]:
    """Every role on ranks of the run, every rank with a role, every layout a divisor of its ranks."""
    if context.world_size is None:
        return
    problems = list(span_problems({key: role.ranks for key, role in context.roles.items()}, context.world_size))
    yield from problems
    if problems:
        return
    for key, role in context.roles.items():
        layout, span = role.parallel, parse_span(role.ranks, context.world_size)
        ranks = layout.tensor * layout.pipeline * layout.context
        if span.count % ranks:
            whole, verb = (
                ("the run's", "start") if role.ranks is None else (f"the {role.ranks} of {key}.ranks:", "give")
            )
            yield Problem(
                f"{key}.parallel",
                f"tensor {layout.tensor} x pipeline {layout.pipeline} x context {layout.context} = {ranks} ranks a "
                f"copy of the model, which does not divide {whole} {span.count}; {verb} a multiple of {ranks} ranks "
                "or lower one of them",
            )


def _sharing(context: Context) -> Iterator[Problem]:
    """Settings that act only where roles share ranks, or only where they do not."""
    size = context.world_size or max(
        [1, *(parse_span(r.ranks, 1).first + parse_span(r.ranks, 1).count for r in context.roles.values())]
    )
    spans = {key: parse_span(role.ranks, size) for key, role in context.roles.items()}
    for key, role in context.roles.items():
        if role.offload and not any(spans[key].meets(span) for other, span in spans.items() if other != key):
            yield Problem(
                f"{key}.offload",
                "true, but no other role is on its ranks, so nobody would use the memory; leave it out",
            )
    apart = [key for key, span in spans.items() if not span.meets(spans["student"])]
    if context.recipe.rollout.group_size and not apart:
        yield Problem(
            "rollout.group_size",
            f"{context.recipe.rollout.group_size}, but every teacher shares the student's ranks and scores when all "
            "answers are there; leave it out, or give a teacher ranks of its own",
        )


def _lengths(context: Context) -> Iterator[Problem]:
    prompt, needs = context.recipe.data.max_prompt_tokens, {"rollout": context.recipe.rollout.max_new_tokens}
    if context.recipe.evaluation.prompts:
        needs["evaluation"] = context.recipe.evaluation.max_new_tokens
    known = [(reach, key) for key in context.roles if (reach := context.number(key, "max_position_embeddings"))]
    if not known:
        return
    reach, role = min(known)
    for section, answer in needs.items():
        if prompt + answer > reach:
            yield Problem(
                f"{section}.max_new_tokens",
                f"{answer} after prompts of up to {prompt} tokens (data.max_prompt_tokens) exceeds the {reach} "
                f"positions of {role}; lower one of them",
            )


def _layer_specs(context: Context) -> Iterator[Problem]:
    for key, role in context.roles.items():
        if role.layer_spec == "te" and context.recipe.run.device == "cpu":
            yield Problem(f"{key}.layer_spec", "te needs CUDA and run.device is cpu; use auto or local")


def _fp8(context: Context) -> Iterator[Problem]:
    for key, role in context.roles.items():
        yield from fp8_problems(context.recipe, key, role, layers=context.number(key, "num_hidden_layers"))


def _hook_names(context: Context) -> Iterator[Problem]:
    if context.recipe.run.plugins:
        return
    for i, hook in enumerate(context.recipe.loss.hooks):
        if hook.name not in BUILTIN_HOOKS:
            close = nearest(hook.name, BUILTIN_HOOKS)
            advice = f"did you mean {close}? Built in are" if close else "built in are"
            yield Problem(
                f"loss.hooks.{i}.name",
                f"no hook is named {hook.name!r}; {advice} {', '.join(BUILTIN_HOOKS)}; a hook of your own needs its "
                "module in run.plugins",
            )


def _micro_batches(context: Context) -> Iterator[Problem]:
    tokens = context.recipe.optimizer.micro_batch_tokens
    for i, hook in enumerate(context.recipe.loss.hooks):
        if tokens and hook.options.get("scope") == "microbatch":
            yield Problem(
                f"loss.hooks.{i}.scope",
                f"'microbatch' takes its statistics over micro-batches of optimizer.micro_batch_size answers, and "
                f"optimizer.micro_batch_tokens is {tokens}; use 'global', or set micro_batch_size instead",
            )


def _counts(context: Context) -> Iterator[Problem]:
    recipe = context.recipe
    answers = recipe.rollout.prompts_per_step * recipe.rollout.samples_per_prompt
    if recipe.optimizer.mini_batches > answers:
        yield Problem(
            "optimizer.mini_batches",
            f"{recipe.optimizer.mini_batches} updates from {answers} answers a step "
            "(rollout.prompts_per_step x samples_per_prompt); lower it",
        )
    if recipe.evaluation.every and not (recipe.evaluation.prompts or recipe.evaluation.benchmarks):
        yield Problem(
            "evaluation.every",
            f"{recipe.evaluation.every}, but evaluation.prompts and evaluation.benchmarks name no file; give one",
        )
    if recipe.data.system_prompt is not None and recipe.data.chat_template == "off":
        yield Problem("data.system_prompt", "needs a chat template and data.chat_template is off; use auto or on")


def _writable(context: Context) -> Iterator[Problem]:
    for key, name in (("run.dir", context.recipe.run.dir), ("checkpoint.dir", context.recipe.checkpoint.dir)):
        if name is None or context.elsewhere:
            continue
        folder = Path(name).absolute()
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir():
            yield Problem(key, f"{name} cannot be made because {folder} is a file; choose another folder")
        elif not os.access(folder, os.W_OK | os.X_OK):
            yield Problem(key, f"{name} cannot be written because {folder} is not writable; choose another folder")


def _home(context: Context) -> Iterator[Problem]:
    """``~`` is the shell's, which does not see into a recipe; taken literally it would make a folder of that name."""
    paths = {f"{key}.checkpoint": role.checkpoint for key, role in context.roles.items()}
    paths |= {f"{key}.path": source.path for key, source in context.files.items()}
    paths |= {"run.dir": context.recipe.run.dir, "checkpoint.dir": context.recipe.checkpoint.dir or ""}
    for key, path in paths.items():
        if path.startswith("~"):
            yield Problem(key, f"{path}: ~ is not replaced here; write {os.path.expanduser(path)}")


CHECKS: tuple[Callable[[Context], Iterator[Problem]], ...] = (
    _labels,
    _prompt_files,
    _checkpoints,
    _tensor_parallel,
    _pipeline,
    _context,
    _experts,
    _spans,
    _sharing,
    _lengths,
    _layer_specs,
    _fp8,
    _hook_names,
    _micro_batches,
    _counts,
    _writable,
    _home,
)
"""Every check, in the order in which their problems are listed."""
