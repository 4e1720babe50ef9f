"""Rules on how models are laid out over ranks."""

from __future__ import annotations

from collections.abc import Iterator

from fire_megatron.config.errors import RecipeProblem
from fire_megatron.config.rules.facts import Facts, Role
from fire_megatron.config.spans import parse_span, span_problems


def tensor(role: Role) -> Iterator[RecipeProblem]:
    size, shape = role.config.parallel.tensor, role.shape
    if role.config.parallel.sequence and size == 1:
        key = role.at("parallel.sequence")
        yield RecipeProblem(key, f"true needs {role.at('parallel.tensor')} above 1; leave it out (null)")
    if shape is None:
        return
    counts = {"heads": shape.heads, "key/value heads": shape.kv_heads}
    counts |= {f"rows of {name}": width for name, width in shape.mlp_widths.items()}
    wrong = {noun: count for noun, count in counts.items() if count % size}
    if size % shape.kv_heads == 0:  # as many ranks share each of them
        wrong.pop("key/value heads", None)
        rows = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        wrong |= {"rows of queries, keys and values": rows} if rows % size else {}
    if wrong:
        yield RecipeProblem(
            role.at("parallel.tensor"),
            f"{size} does not divide the model's {' nor its '.join(f'{n} {noun}' for noun, n in wrong.items())}; "
            f"choose a number that divides {' and '.join(map(str, counts.values()))}, or a multiple of the "
            f"{shape.kv_heads} key/value heads that divides the others",
        )


def pipeline(role: Role) -> Iterator[RecipeProblem]:
    stages = role.config.parallel.pipeline
    if role.shape and stages > role.shape.num_layers:
        yield RecipeProblem(
            role.at("parallel.pipeline"), f"{stages} stages for a model of {role.shape.num_layers} layers; lower it"
        )


def copies(role: Role) -> Iterator[RecipeProblem]:
    """Ranks hold whole copies of a model."""
    layout = role.config.parallel
    if role.ranks is None or role.ranks % role.copy_ranks == 0:
        return
    own = role.config.ranks
    whole, verb = ("the run's", "start") if own is None else (f"the {own} of {role.at('ranks')}:", "give")
    yield RecipeProblem(
        role.at("parallel"),
        f"tensor {layout.tensor} x pipeline {layout.pipeline} x context {layout.context} = {role.copy_ranks} ranks a "
        f"copy of the model, which does not divide {whole} {role.ranks}; {verb} a multiple of {role.copy_ranks} ranks "
        "or lower one of them",
    )


def experts(role: Role) -> Iterator[RecipeProblem]:
    layout, key = role.config.parallel, role.at("parallel.expert")
    if role.shape and role.shape.experts is None and layout.expert > 1:
        yield RecipeProblem(key, f"{layout.expert}, but the model has no experts; leave it 1")
    if role.shape and role.shape.experts:
        if role.shape.experts.count % layout.expert:
            count = role.shape.experts.count
            yield RecipeProblem(
                key, f"{layout.expert} does not divide the model's {count} experts; choose a number that does"
            )
        if role.trains and layout.tensor > 1 and layout.sequence is False:
            yield RecipeProblem(
                role.at("parallel.sequence"),
                f"false, but experts train with parallel.tensor {layout.tensor} only with sequence parallelism; leave "
                "it out (null)",
            )
    if role.ranks is None or role.ranks % role.copy_ranks:
        return  # nothing to say, or said by copies()
    stage = role.ranks // (layout.tensor * layout.pipeline)
    if stage % layout.expert:
        yield RecipeProblem(
            key,
            f"{layout.expert} does not divide the {stage} ranks that share the experts of a pipeline stage "
            f"(context x data, of the role's {role.ranks} ranks); lower it or give it more ranks",
        )


_COMMUNICATIONS = ("p2p", "all_gather", "a2a")
"""How Transformer Engine may share keys and values; its fourth way reads groups from the global parallel_state."""


def context(role: Role) -> Iterator[RecipeProblem]:
    """How context ranks share keys and values is Transformer Engine's to choose."""
    chosen, layout, text = role.config.megatron.get("cp_comm_type"), role.config.parallel, None
    ranks = layout.tensor * layout.context
    if chosen is None:
        return
    if chosen not in _COMMUNICATIONS:
        text = f"is not one of {', '.join(_COMMUNICATIONS)}; take one"
    elif layout.context == 1:
        text = f"has no effect, since {role.at('parallel.context')} is 1; leave it out"
    elif role.config.layer_spec == "local":
        text = f"is read by Transformer Engine's layers and {role.at('layer_spec')} is local; leave it out"
    elif role.shape and chosen == "a2a" and role.shape.kv_heads % ranks:
        text = (
            f"shares out the model's {role.shape.kv_heads} key/value heads over tensor {layout.tensor} x context "
            f"{layout.context} = {ranks} ranks, which does not divide them; use 'p2p' or 'all_gather'"
        )
    elif role.shape and chosen == "p2p" and role.shape.sliding_window is not None:
        text = (
            f"knows no sliding window, and the model's is {role.shape.sliding_window} tokens; leave it out, or use "
            "'all_gather' or 'a2a'"
        )
    if text:
        yield RecipeProblem(role.at("megatron.cp_comm_type"), f"{chosen!r} {text}")


def spans(facts: Facts) -> Iterator[RecipeProblem]:
    """Every role on ranks of the run, every rank with a role."""
    if facts.world_size is not None:
        yield from span_problems({key: role.config.ranks for key, role in facts.roles.items()}, facts.world_size)


def sharing(facts: Facts) -> Iterator[RecipeProblem]:
    """Settings that act only where roles share ranks, or only where they do not."""
    named = {key: role.config.ranks for key, role in facts.roles.items()}
    ends = [span.first + span.count for span in (parse_span(ranks, 1) for ranks in named.values())]
    held = {key: parse_span(ranks, facts.world_size or max(1, *ends)) for key, ranks in named.items()}
    for key, role in facts.roles.items():
        if role.config.offload and not any(held[key].meets(span) for other, span in held.items() if other != key):
            yield RecipeProblem(
                role.at("offload"),
                "true, but no other role is on its ranks, so the memory would not be used; leave it out",
            )
    size = facts.recipe.rollout.group_size
    if size and all(span.meets(held["student"]) for span in held.values()):
        yield RecipeProblem(
            "rollout.group_size",
            f"{size}, but every teacher shares the student's ranks and scores when all answers are there; leave it "
            "out, or give a teacher ranks of its own",
        )
