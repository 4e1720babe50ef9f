"""The plan for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from fire_megatron.config.roles import roles
from fire_megatron.metrics.table import aligned
from fire_megatron.plan.advice import Advice
from fire_megatron.plan.plan import GIB, Plan, RankKind, held, on_host, span_text
from fire_megatron.plan.timing import assumptions, communication, seconds

_table = partial(aligned, indent="  ")


def describe(plan: Plan, advice: Sequence[Advice]) -> str:
    """The whole report."""
    job = plan.job
    load = job.workload
    lines = [
        f"{job.recipe.run.name} on {job.world_size} ranks"
        + (f" of {job.gpu.name}" if job.gpu else "")
        + f": {load.rows} answers a step, {load.kept} of them kept, prompts of {load.prompt_tokens} tokens, answers of "
        f"{load.response_tokens}",
        *(f"  {note}" for note in job.notes),
        "",
        "Roles",
        *_table(list(_role_rows(plan))),
    ]
    for kind in plan.kinds:
        lines += ["", *_rank_kind(plan, kind)]
    lines += ["", *_verdict(plan, advice)]
    if plan.time is not None and job.gpu is not None:
        lines += ["", *_time(plan), "", "Assumptions", *(f"  {a}" for a in assumptions(job.gpu, job.gpus_per_node))]
    return "\n".join(lines)


def gib(size: float) -> str:
    """``12.34 GiB``, or smaller units."""
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"


def _role_rows(plan: Plan) -> Iterable[Sequence[str]]:
    yield "role", "ranks", "tensor", "pipeline", "context", "expert", "data", "format", "offloaded"
    for path, layout in plan.job.layouts.items():
        role = roles(plan.job.recipe)[path]
        fp8 = role.precision.fp8
        form = role.precision.dtype + (f", FP8 {fp8.recipe}" if fp8 else "")
        sizes = [layout.tensor, layout.pipeline, layout.context, layout.expert, layout.data]
        yield path, span_text(layout.ranks), *map(str, sizes), form, "yes" if role.offload else "no"


def _rank_kind(plan: Plan, kind: RankKind) -> list[str]:
    most = f", {gib(kind.peak)} at most ({kind.busiest})"
    room = "" if kind.capacity is None else f" of {gib(kind.capacity)}: " + ("fits" if kind.fits else "DOES NOT FIT")
    lines = [f"Ranks {span_text(kind.ranks)} ({len(kind.ranks)}){most}{room}"]
    host = on_host(plan.job.recipe, kind.plan)
    if host:
        lines.append(
            f"wait on the host: {gib(host)} of each rank, {gib(host * plan.job.gpus_per_node)} of a node's ranks"
        )
    if kind.plan.communicators and plan.job.gpu is not None:
        lines.append(f"communicate in {kind.plan.communicators} groups of ranks")
    rows = [("role", "parameters", "weights", "gradients", "optimizer", "teachers' heads", "FP8 copies")]
    rows += [
        (path, f"{m.parameters:,}", *map(gib, (m.weights, m.gradients, m.optimizer, m.heads, m.fp8_copies)))
        for path, m in kind.plan.roles.items()
    ]
    lines += _table(rows)
    rows = [("phase", "held", "activations", "key/value cache", "loss chunk", "peak", "TFLOP", "collectives")]
    for name, phase in kind.plan.phases.items():
        rows.append(
            (
                name,
                gib(held(plan.job.recipe, kind.plan, name)),
                gib(max(phase.trace.peak - phase.kv_cache - phase.loss, 0)),
                gib(phase.kv_cache),
                gib(phase.loss),
                gib(kind.peaks[name]),
                f"{phase.trace.flops / 1e12:,.1f}",
                gib(sum(size for _, size, _ in phase.trace.messages())),
            )
        )
    lines += ["", *_table(rows)]
    rows = []
    for name, phase in kind.plan.phases.items():
        for c, size, calls in phase.trace.messages():
            row = [f"{name}: {c.operation}", kind.plan.group(name, c), str(len(c.ranks)), gib(size)]
            row.append(f"{calls:,}")
            if plan.job.gpu is not None:
                row.append(f"{1e3 * seconds(c, size, calls, plan.job.gpu, plan.job.gpus_per_node):,.1f} ms")
            rows.append(tuple(row))
    if rows:
        head = ("collective a step", "group", "ranks", "bytes", "calls", *(("time",) if plan.job.gpu else ()))
        lines += ["", *_table([head, *rows])]
    return lines


def _verdict(plan: Plan, advice: Sequence[Advice]) -> list[str]:
    if plan.job.gpu is None:
        return ["Name a GPU (--gpu) to hear whether this fits and how long a step takes."]
    if all(kind.fits for kind in plan.kinds):
        least = min(plan.kinds, key=lambda kind: (kind.capacity or 0) - kind.peak)
        return [f"Fits, with {gib((least.capacity or 0) - least.peak)} to spare on ranks {span_text(least.ranks)}."]
    lines = [f"Does not fit on ranks {span_text(kind.ranks)}." for kind in plan.kinds if not kind.fits]
    if not advice:
        return [*lines, "None of the settings that were tried helps; use more ranks or a smaller workload."]
    lines.append(f"What helps, tried on rank {advice[0].rank}, one after the other:")
    return lines + [
        f"  {a.change}: {gib(a.before)} -> {gib(a.after)}" + (", which fits" if a.fits else "") for a in advice
    ]


def _time(plan: Plan) -> list[str]:
    time = plan.time
    assert time is not None and plan.job.gpu is not None
    load = plan.job.workload
    rows = [("a step takes about", f"{time.total:.1f} s"), ("  sampling", f"{time.sampling:.1f} s")]
    for name, spent in time.scoring.items():
        rows.append((f"  scoring by {name}", f"{spent:.1f} s"))
    rows += [
        ("  scoring not hidden by sampling", f"{time.exposed:.1f} s"),
        ("  exchange of rows", f"{time.exchange:.1f} s"),
        ("  update", f"{time.update:.1f} s"),
    ]
    if time.bubble:
        rows.append(("  of whose products the pipeline's bubble is", f"{time.bubble:.1%}"))
    students = [kind for kind in plan.kinds if "update" in kind.plan.phases]
    spent = max(communication(k.plan.phases["update"].trace, plan.job.gpu, plan.job.gpus_per_node) for k in students)
    rows.append(("  of which collectives", f"{spent:.1f} s"))
    rows.append(("answer tokens a second", f"{load.rows * load.response_tokens / time.total:,.0f}"))
    return ["Time (an estimate)", *_table(rows)]
