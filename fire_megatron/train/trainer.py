"""The loop: sample, score, select, update, report, save."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fire_megatron.checkpoint.training import find_latest, load_training_state, save_training_state
from fire_megatron.config.errors import CheckpointError, RecipeError, TrainingError, UserError
from fire_megatron.config.load import load_recipe, save_recipe
from fire_megatron.config.schema import Recipe
from fire_megatron.data.prompts import fingerprint
from fire_megatron.data.rollouts import KeptStates, Rollouts, Scores, TrainingRows
from fire_megatron.evaluation.heldout import format_table, replica_rows
from fire_megatron.metrics.logger import METRICS_FILE, RECIPE_FILE, MetricsLogger, set_aside
from fire_megatron.metrics.values import Last, Max, Value, merge, reduce_metrics
from fire_megatron.parallel.collectives import all_gather_objects
from fire_megatron.parallel.reducer import Reducer
from fire_megatron.platform import (
    Watch,
    World,
    capability_report,
    get_rng_state,
    launch,
    peak_memory_mb,
    seed_everything,
    set_rng_state,
    synchronize,
)
from fire_megatron.platform.watch import SAVING
from fire_megatron.rollout.engine import Progress
from fire_megatron.teachers.service import serve_student
from fire_megatron.teachers.transfer import Transfer
from fire_megatron.train.gpus import RunGpus
from fire_megatron.train.inputs import rank_roles
from fire_megatron.train.interrupt import StopRequest
from fire_megatron.train.schedule import learning_rate
from fire_megatron.train.select import mini_batches, rebalance, rollout_metrics, sample_lines, select
from fire_megatron.train.setup import Run, StudentRun, on_all_ranks, prepare


class _Stopped(Exception):
    """All ranks have agreed to leave; the step in progress is given up (it is redone exactly on resume)."""


class Trainer:
    """Runs a recipe from its first or last saved step to its end."""

    def __init__(self, recipe: Recipe, world: World, watch: Watch | None = None) -> None:
        """Build or resume the run. Collective over the world.

        Args:
            recipe: as loaded and checked by config/.
            world: this process's place.
            watch: its signs of life; without one it shows none.

        Raises:
            UserError: see :func:`fire_megatron.train.setup.prepare`; also a run folder that may not be continued.
        """
        self.recipe, self.world = recipe, world
        timeout = recipe.run.collective_timeout
        self.watch = watch or launch.watch(world, roles=rank_roles(recipe, world), timeout=timeout)
        self.folder = Path(recipe.run.dir)
        self.checkpoints = Path(recipe.checkpoint.dir or self.folder / "checkpoints")
        latest = on_all_ranks(self._resume_point)
        seed_everything(recipe.run.seed, device=world.device)
        self.prepared: Run = prepare(recipe, world, self.watch, self._say)
        self.step = 0
        self.first_eval: dict[str, float] = {}
        self.last_eval: dict[str, float] = {}
        if latest is not None:
            on_all_ranks(self._resume, latest)
        self.logger = on_all_ranks(self._open_run_folder, resumed=latest is not None)
        self.gpus = RunGpus(world.device, recipe.metrics, self.prepared.control)
        self.stop = StopRequest()
        self._clock: dict[str, float] = {}

    @property
    def run(self) -> StudentRun:
        """What the ranks of the student step with."""
        assert self.prepared.student is not None, "a rank without the student has nothing to step with"
        return self.prepared.student

    def _say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)

    # ---- run folder -------------------------------------------------------------------------------------------

    def _resume_point(self) -> Path | None:
        """The checkpoint to continue from, by ``run.resume``. Collective."""
        # The first rank decides: views of a shared folder may differ for a moment. The others then look for that step.
        seen = find_latest(self.checkpoints) if self.world.is_main else None
        latest, mode = all_gather_objects(seen, group=dist.group.WORLD)[0], self.recipe.run.resume
        if mode == "must" and latest is None:
            raise RecipeError(f"run.resume is 'must' but {self.checkpoints} holds no complete checkpoint; use 'auto'")
        if mode == "never" and (latest is not None or (self.folder / METRICS_FILE).exists()):
            raise RecipeError(
                f"run.resume is 'never' but {self.folder} already holds a run; choose another run.dir or use 'auto'"
            )
        if latest is not None and not latest.is_dir():
            raise CheckpointError(
                f"{latest}: rank 0 sees it and rank {self.world.rank} does not; checkpoint.dir must be one folder "
                "for all ranks"
            )
        return latest

    def _open_run_folder(self, *, resumed: bool) -> MetricsLogger:
        """Save the resolved recipe and open the metrics; only the main rank writes."""
        if self.world.is_main:
            for path in [] if resumed else set_aside(self.folder):
                self._say(f"an earlier run here saved no checkpoint to continue from; its file is now {path}")
            self._save_recipe()
        return MetricsLogger(
            self.folder,
            self.recipe.metrics,
            total_steps=self.recipe.run.steps,
            start_step=self.step if resumed else -1,
            enabled=self.world.is_main,
        )

    def _save_recipe(self) -> None:
        """The recipe as used; beside the first one where a resumed run has another."""
        first = self.folder / RECIPE_FILE
        if first.exists() and load_recipe(first) == self.recipe:
            return
        save_recipe(self.recipe, self.folder / f"recipe_from_{self.step:06d}.yaml" if first.exists() else first)

    def _resume(self, checkpoint: Path) -> None:
        if self.prepared.student is None:
            return  # teachers do not change
        run = self.run
        try:
            state = load_training_state(checkpoint, run.student.model, run.student.optimizer, grid=run.grid)
        except CheckpointError as error:  # every rank's
            error.args = (f"{error}\ndelete {checkpoint} to continue from the step saved before it",)
            raise
        self._require_same_order(checkpoint, state.extra["order"])
        set_rng_state(state.rng, device=self.world.device)
        self.step, self.first_eval = state.step, dict(state.extra["first_eval"])
        self._say(f"resumed from {checkpoint} after step {self.step}")

    @cached_property
    def _order(self) -> dict[str, Any]:
        """What fixes the prompts of every step, by recipe key; hashes every prompt, so once a run."""
        recipe = self.recipe
        return {
            "data.train": fingerprint(self.run.inputs.prompts),
            "data.shuffle": recipe.data.shuffle,
            "rollout.prompts_per_step": recipe.rollout.prompts_per_step,
            "run.seed": recipe.run.seed,
        }

    def _require_same_order(self, checkpoint: Path, saved: dict[str, Any]) -> None:
        now = self._order
        for key in (key for key in now if now[key] != saved[key]):
            was = "other prompts" if key == "data.train" else f"{saved[key]!r}, and is now {now[key]!r}"
            raise RecipeError(
                f"{key}: {checkpoint} was trained with {was}, so the steps to come would repeat or skip prompts; "
                "restore it, or start a new run.dir from the exported student"
            )

    def save(self) -> None:
        """Write a checkpoint of the last completed step. Collective."""
        run = self.run
        self.watch.doing(SAVING)
        with self.watch.unbroken():
            save_training_state(
                self.checkpoints,
                self.step,
                run.student.model,
                run.student.optimizer,
                rng=get_rng_state(device=self.world.device),
                extra={"order": self._order, "first_eval": self.first_eval},
                source=Path(self.recipe.student.checkpoint),
                keep=self.recipe.checkpoint.keep,
                grid=run.grid,
            )
        self._saved = self.step
        self.logger.message(f"saved checkpoint of step {self.step} to {self.checkpoints}")

    # ---- the loop ---------------------------------------------------------------------------------------------

    def train(self) -> bool:
        """Run to the end, or until asked to stop. Returns whether the recipe's last step is done."""
        self._say(capability_report(self.world.device))
        self._saved = self.step
        # Given back only at an end in good order: a launcher that sees one rank fail signals the others, which shall
        # live long enough to say which it was.
        self.stop.install()
        with self.gpus:
            done = self._serve() if self.prepared.student is None else self._lead()
        self.stop.restore()
        return done

    def _lead(self) -> bool:
        """On the student's ranks, which tell the others when it is over."""
        try:
            done = self._train()
        except UserError as error:
            self.run.router.announce(do="stop", error=str(error))
            raise
        finally:
            self.logger.close()
        self.run.router.announce(do="stop", error=None)
        return done

    def _train(self) -> bool:
        """The loop."""
        evaluation = self.recipe.evaluation
        try:
            if self.step == 0 and self.run.held_out and evaluation.at_start:
                self.first_eval = self._evaluate()
                self.logger.log(0, self.first_eval)
            while self.step < self.recipe.run.steps:
                self._check_stop()
                self._one_step()
                if self.recipe.checkpoint.every and self.step % self.recipe.checkpoint.every == 0:
                    self.save()
            if self.recipe.checkpoint.final and self._saved != self.step:
                self.save()
        except _Stopped:
            if self._saved != self.step:
                self.save()
            self.logger.message(f"stopped by {self.stop.signal_name} after step {self.step}; run again to continue")
            return False
        self._print_table()
        return True

    def _serve(self) -> bool:
        """On ranks that hold teachers only."""
        pool, control = self.prepared.pool, self.prepared.control
        assert control is not None

        def idle() -> None:
            if self.stop.signal_name:
                control.ask_to_stop(self.stop.signal_name)

        transfer = Transfer(pool, self.prepared.grid)
        problem = serve_student(pool, transfer, control, idle=idle, done=self.gpus.report)
        if problem is not None:
            error = TrainingError(problem)
            error.everywhere = True
            raise error
        return True

    def _one_step(self) -> None:
        started = time.perf_counter()
        self._clock = {}
        metrics = self.training_step(self.step)
        self.step += 1
        last, evaluation = self.step == self.recipe.run.steps, self.recipe.evaluation
        due = bool(evaluation.every) and self.step % evaluation.every == 0
        seconds = time.perf_counter() - started
        metrics |= {f"time/{phase}": Max(spent) for phase, spent in self._clock.items()}
        metrics["time/step"] = Max(seconds)
        metrics["memory/peak_mb"] = Max(peak_memory_mb(self.world.device))
        metrics |= self.gpus.values()
        reduced = reduce_metrics(metrics, group=self.run.grid.span)
        reduced["rollout/tokens_per_second"] = reduced["rollout/tokens"] / reduced["time/rollout"]
        if self.run.held_out and (due or (last and evaluation.at_end)):
            self.last_eval = self._evaluate()
            reduced |= self.last_eval
        self.logger.log(self.step, reduced)
        self._require_sound(reduced)

    def _require_sound(self, metrics: dict[str, float]) -> None:
        """Stop before weights that an update has ruined are saved over good ones."""
        rows = self.recipe.rollout.prompts_per_step * self.recipe.rollout.samples_per_prompt
        broken = [key for key in ("loss", "grad_norm") if not math.isfinite(metrics.get(key, 0.0))]
        if metrics.get("fire/dropped/nonfinite", 0.0) >= rows:
            broken.append("log-probability of every answer")
        if not broken:
            return
        kept = find_latest(self.checkpoints)
        error = TrainingError(
            f"step {self.step}: {' and '.join(broken)} not finite, so the run stops without saving; "
            f"lower optimizer.lr ({self.recipe.optimizer.lr:g}) or optimizer.clip_grad, or raise warmup_steps; then "
            + (f"run again to continue from {kept}" if kept else "start again")
        )
        error.everywhere = True  # the metrics are reduced: all ranks see the same
        raise error

    def training_step(self, step: int) -> dict[str, Value]:
        """One step of distillation; returns metrics to be reduced over the student's span."""
        run, recipe = self.run, self.recipe
        rollouts, scores, routed = self._sample_and_score(step)
        self._check_stop()
        with self._timed("update"):
            self._show("update")
            rows, selected = select(
                rollouts,
                scores,
                run.router.names,
                run.hooks,
                micro_batch_size=recipe.optimizer.micro_batch_size,
                grid=run.grid,
            )
            updated = self._update(rows, scores.kept, step)
        self.logger.samples(step + 1, sample_lines(rollouts, scores, run.inputs.tokenizer.decode))
        # Every rank of a replica holds the same rollouts; one of them counts.
        counts = run.grid.tp_rank == 0 and run.grid.is_first_stage
        return (rollout_metrics(rollouts) | selected if counts else {}) | routed | updated

    def _sample_and_score(self, step: int) -> tuple[Rollouts, Scores, dict[str, Value]]:
        """Rollouts of this replica and what the teachers say of them, some of whom score while it samples; and what
        that took."""
        run, repeats = self.run, self.recipe.rollout.samples_per_prompt
        prompts = [run.inputs.prompts[i] for i in run.order.batch(step) for _ in range(repeats)]
        mine = replica_rows(len(prompts), run.grid)
        progress = self._progress("rollout", len(mine) * self.recipe.rollout.max_new_tokens)
        own = [prompts[i] for i in mine]
        with self._timed("rollout"):
            session = run.router.open(own, mine, total=len(prompts), keep_states=True)
            rollouts = run.engine.generate(
                own, mine, step=step, progress=progress, finished=session.send, group_size=session.group_size
            )
        if self._asked_to_stop():
            session.drain()
            raise _Stopped
        with self._timed("teacher_exposed"):
            scores = session.finish(rollouts, progress=lambda name: self._show(f"teacher {name}"))
        return rollouts, scores, session.metrics()

    def _show(self, doing: str) -> None:
        self.logger.progress(f"step {self.step + 1}: {doing}")

    def _progress(self, phase: str, most: int) -> Progress:
        """Shows how far a phase of the step is; ``most`` tokens is all that it can sample."""
        done = 0

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            self._show(f"{phase} {done / max(most, 1):.0%}")

        return advance

    def _update(self, rows: TrainingRows, kept: Mapping[str, KeptStates], step: int) -> dict[str, Value]:
        """One optimizer update a mini-batch, each on an even share of the rows that the filter left."""
        student, reducer = self.run.student, Reducer(self.run.grid.pg.dp)
        rate = learning_rate(self.recipe.optimizer, step, self.recipe.run.steps)
        student.set_learning_rate(rate)
        parts = [rebalance(part, grid=self.run.grid) for part in mini_batches(rows, self.recipe.optimizer.mini_batches)]
        # With a single update the weights are those that the first forward pass uses, so it gives the old log-probs.
        moving = len(parts) > 1 and student.objective.reads_old
        old = [student.log_probs(part) if moving else None for part in parts]
        metrics: dict[str, Value] = {"learning_rate": Last(rate)}
        for part, old_log_probs in zip(parts, old, strict=True):
            tokens = student.count_tokens(part, reducer)
            if tokens == 0:  # everything was dropped: nothing to learn from, on any rank
                continue
            part, traffic = self.run.router.attach(part, kept)
            merge(metrics, traffic)
            merge(metrics, student.accumulate_gradients(part, tokens=tokens, old=old_log_probs))
            metrics |= student.update()
        return metrics

    def _evaluate(self) -> dict[str, float]:
        assert self.run.held_out is not None
        self.watch.doing("evaluation")
        most = len(replica_rows(len(self.run.inputs.held_out), self.run.grid)) * self.recipe.evaluation.max_new_tokens
        measured = self.run.held_out.measure(self._progress("evaluation", most))
        counts = self.run.grid.tp_rank == 0 and self.run.grid.is_first_stage
        return reduce_metrics(measured if counts else {}, group=self.run.grid.span)

    def _print_table(self) -> None:
        if self.last_eval and self.world.is_main:
            targets = [self.run.router.target(prompt).name for prompt in self.run.inputs.held_out]
            table = format_table(self.first_eval, self.last_eval, targets)
            print(f"\nReverse KL (nats a token) of the student's samples on held-out prompts\n{table}", flush=True)

    def _asked_to_stop(self) -> bool:
        """Whether any rank of the run was. Collective over the student's ranks."""
        control = self.prepared.control
        if control is not None and self.world.is_main and self.stop.signal_name is None:
            passed_on = control.asked_to_stop()
            if passed_on:
                self.stop.signal_name = f"{passed_on} to a rank without the student"
        return self.stop.agreed(group=self.run.grid.span)

    def _check_stop(self) -> None:
        if self._asked_to_stop():
            raise _Stopped

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        self.watch.doing(phase)
        started = time.perf_counter()
        yield
        synchronize(self.world.device)
        self._clock[phase] = self._clock.get(phase, 0.0) + time.perf_counter() - started
