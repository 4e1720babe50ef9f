"""One step of the method: sample, score, select, update (FiRe-OPD, arXiv 2606.02684).

Data moves one way, each stage returns a new record (data/rollouts.py), and none changes an earlier one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from fire_megatron.data.records import Prompt
from fire_megatron.data.rollouts import KeptStates, Rollouts, Scores, TrainingRows
from fire_megatron.metrics.values import Last, Value, merge
from fire_megatron.parallel.reducer import Reducer
from fire_megatron.teachers.router import Scoring
from fire_megatron.train.guard import skips
from fire_megatron.train.run import Run
from fire_megatron.train.schedule import learning_rate
from fire_megatron.train.select import Selected, mini_batches, rollout_metrics, select


@dataclass(frozen=True)
class StepReport:
    """What a step has done, on this rank."""

    rollouts: Rollouts
    scores: Scores
    selected: Selected
    metrics: dict[str, Value]
    """To be reduced over the student's ranks."""


def train_step(run: Run, step: int) -> StepReport:
    """One step of distillation; every rank of the student calls it alike.

    Args:
        run: what it steps with.
        step: steps done before it.

    Raises:
        Stopped: the run was asked to stop meanwhile; no weight has changed.
    """
    run.phases.restart()
    rows = run.own_rows(step)
    scoring = open_scoring(run, rows)  # teachers on ranks of their own score while the student samples
    rollouts = sample(run, rows, scoring, step)
    scores = score(run, scoring, rollouts)
    routed = scoring.metrics()
    with run.phases("update"):
        run.phases.show("update")
        size = run.recipe.optimizer.micro_batch_size
        # Filter and reweight, over the global batch.
        selected = select(rollouts, scores, run.hooks, run.router.names, micro_batch_size=size, grid=run.grid)
        updated = update(run, selected.rows, scores.kept, step)
    run.engine.publish(step + 1)  # what sampling keeps of the weights is of the updated ones from here on
    # Every rank of a replica holds the same rollouts; one of them counts.
    counted = rollout_metrics(rollouts) | selected.metrics if run.grid.leads_rows else {}
    return StepReport(rollouts, scores, selected, counted | routed | updated)


def open_scoring(run: Run, rows: Mapping[int, Prompt]) -> Scoring:
    """Tell the teachers that this replica's rows of a step will come."""
    with run.phases("rollout"):
        return run.router.open(
            list(rows.values()),
            list(rows),
            total=run.rows_per_step,
            keep_states=True,
            temperature=run.recipe.loss.temperature,
        )


def sample(run: Run, rows: Mapping[int, Prompt], scoring: Scoring, step: int) -> Rollouts:
    """Answers of this replica's rows; those that are finished go to the teachers in groups."""
    most = len(rows) * run.recipe.rollout.max_new_tokens
    with run.phases("rollout"):
        rollouts = run.engine.generate(
            list(rows.values()),
            list(rows),
            sampling=run.sampling,
            step=step,
            progress=run.phases.progress("rollout", most),
            finished=scoring.send,
            group_size=scoring.group_size,
        )
    run.wait_for_replicas()
    run.leave_if_asked(first=scoring.drain)
    return rollouts


def score(run: Run, scoring: Scoring, rollouts: Rollouts) -> Scores:
    """What each row's teachers say of it."""
    with run.phases("teacher_exposed"):
        scores = scoring.finish(rollouts, progress=lambda name: run.phases.show(f"teacher {name}"))
    run.leave_if_asked()
    return scores


def update(run: Run, rows: TrainingRows, kept: Mapping[str, KeptStates], step: int) -> dict[str, Value]:
    """One optimizer update a mini-batch, each on an even share of the rows that the filter left.

    Args:
        run: what it steps with.
        rows: that survived, of this replica.
        kept: what the teachers keep of them, where the loss needs more than log-probabilities.
        step: steps done before this one.

    Returns:
        Metrics of loss and gradient, to be reduced.
    """
    student, reducer = run.student, Reducer(run.grid.pg.dp)
    rate = learning_rate(run.recipe.optimizer, step, run.recipe.run.steps)
    student.set_learning_rate(rate)
    parts = run.shared_out(mini_batches(rows, run.recipe.optimizer.mini_batches), step)
    # With a single update the weights are those that the first forward pass uses, so it gives the old log-probs.
    moving = len(parts) > 1 and student.objective.reads_old
    old = [student.log_probs(part) if moving else None for part in parts]
    metrics: dict[str, Value] = {"learning_rate": Last(rate)}
    for part, old_log_probs in zip(parts, old, strict=True):
        tokens = student.count_tokens(part, reducer)
        if tokens == 0:  # everything was dropped: nothing to learn from, on any rank
            continue
        part, traffic = run.router.attach(part, kept)
        merge(metrics, traffic)
        report = student.accumulate_gradients(part, tokens=tokens, old=old_log_probs)
        metrics |= student.update(partial(skips, run.guard, report, group=run.grid.span))
        merge(metrics, report)
    return metrics
