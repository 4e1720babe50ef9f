"""The loop: sample, score, select, update, report, save."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch.distributed as dist

from fire_megatron.checkpoint.steps import find_saved
from fire_megatron.config.errors import TrainingError, UserError
from fire_megatron.config.roles import resolved
from fire_megatron.config.schema import Recipe
from fire_megatron.data.rollouts import KeptStates, Rollouts, Scores, TrainingRows
from fire_megatron.evaluation.during import take_exams
from fire_megatron.evaluation.heldout import replica_rows
from fire_megatron.metrics.values import Last, Max, Value, merge, reduce_metrics
from fire_megatron.parallel.collectives import all_gather_objects, everywhere, wait_for_all
from fire_megatron.parallel.reducer import Reducer
from fire_megatron.platform import launch
from fire_megatron.platform.capabilities import capability_report
from fire_megatron.platform.device import peak_memory_mb, synchronize
from fire_megatron.platform.launch import World
from fire_megatron.platform.rng import seed_everything
from fire_megatron.platform.watch import Watch
from fire_megatron.rollout.engine import Progress
from fire_megatron.teachers.service import serve_student
from fire_megatron.teachers.transfer import Transfer
from fire_megatron.train.checkpoints import Checkpoints
from fire_megatron.train.ending import end_tables
from fire_megatron.train.gpus import RunGpus
from fire_megatron.train.guard import NONFINITE, UpdateGuard, agreed
from fire_megatron.train.inputs import rank_roles
from fire_megatron.train.interrupt import StopRequest
from fire_megatron.train.run_folder import RunFolder
from fire_megatron.train.samples import sample_lines
from fire_megatron.train.schedule import learning_rate
from fire_megatron.train.select import mini_batches, rollout_metrics, select
from fire_megatron.train.setup import Run, StudentRun, checkpoint_folder, prepare


class _Stopped(Exception):
    """All ranks have agreed to leave; the step in progress is given up (it is redone exactly on resume)."""


class Trainer:
    """Runs a recipe from its first or last saved step to its end."""

    def __init__(
        self, recipe: Recipe, world: World, watch: Watch | None = None, stop: StopRequest | None = None
    ) -> None:
        """Build or resume the run. Collective over the world.

        Args:
            recipe: as loaded and checked by config/; formats that it leaves open are named here, for the whole run.
            world: this process's place.
            watch: its signs of life; without one it shows none.
            stop: hears signals already; without one they are heard from :meth:`train` on.

        Raises:
            UserError: see :func:`fire_megatron.train.setup.prepare`; also a run folder that may not be continued.
        """
        recipe = resolved(recipe, world.device.kind)
        self.recipe, self.world = recipe, world
        timeout = recipe.run.collective_timeout
        self.watch = watch or launch.watch(world, roles=rank_roles(recipe, world), timeout=timeout)
        self.stop = stop or StopRequest()
        # The first rank decides: views of a shared folder may differ for a moment. The others then look for these.
        seen = find_saved(checkpoint_folder(recipe)) if world.is_main else []
        found = all_gather_objects(seen, group=dist.group.WORLD)[0]
        self.checkpoints = everywhere(Checkpoints, recipe, world, self._say, found)
        self.folder = everywhere(RunFolder, recipe, world, self._say, saved=self.checkpoints.newest())
        seed_everything(recipe.run.seed, device=world.device)
        self.prepared: Run = prepare(recipe, world, self.watch, self._say)
        self.guard = UpdateGuard(recipe.optimizer.guard)
        self.step = 0
        self.first_eval: dict[str, float] = {}
        self.last_eval: dict[str, float] = {}
        self._untold: dict[str, float] = {}
        """Metrics of the last step, while its evaluation is still to come."""
        self.watch.doing("resuming")
        resumed = everywhere(self._resume)
        self.logger = everywhere(self.folder.open, step=self.step, resumed=resumed, told=not self._untold)
        self.gpus = RunGpus(world.device, recipe.metrics, self.prepared.control)
        self._clock: dict[str, float] = {}

    @property
    def run(self) -> StudentRun:
        """What the ranks of the student step with."""
        assert self.prepared.student is not None, "a rank without the student has nothing to step with"
        return self.prepared.student

    def _say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)

    def _resume(self) -> bool:
        """Whether there was something to continue from."""
        if self.prepared.student is None:
            return bool(self.checkpoints.found)  # teachers do not change
        state = self.checkpoints.resume(self.run)
        if state is not None:
            self.step, self.first_eval = state.step, dict(state.extra["first_eval"])
            self.guard.load(state.extra.get("guard", {}))
            self._untold = dict(state.extra.get("untold", {}))
        return state is not None

    def save(self) -> None:
        """Save the last completed step, or begin to. Collective over the student's ranks."""
        self.watch.doing("saving")
        extra = {"first_eval": self.first_eval, "guard": self.guard.state(), "untold": self._untold}
        self.checkpoints.save(self.run, self.step, extra)
        self._tell_saved()

    def _tell_saved(self) -> None:
        for step, seconds in self.run.saver.finished():
            self.logger.message(f"saved checkpoint of step {step} to {self.checkpoints.folder} in {seconds:.1f} s")
            self.folder.note(step=self.step, saved=step, restarts=0)

    # ---- the loop ---------------------------------------------------------------------------------------------

    def train(self) -> bool:
        """Run to the end, or until asked to stop. Returns whether the recipe's last step is done."""
        self._say(capability_report(self.world.device))
        self.stop.install()
        with self.gpus:
            done = self._serve() if self.prepared.student is None else self._lead()
        # Given back only at an end in good order: a launcher that sees one rank fail signals the others, which shall
        # live long enough to say which it was.
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
        final, done = self.recipe.checkpoint.final, False
        try:
            if self.step == 0 and self._measures and self.recipe.evaluation.at_start:
                self.first_eval = self._evaluate()
                self.logger.log(0, self.first_eval)
            if self._untold:
                self._tell_step()
            while self.step < self.recipe.run.steps:
                self._check_stop()
                self._one_step()
                self._save_if_due()
            done = True
        except _Stopped:
            pass
        finally:
            self._finish_saving()
        if (final or not done) and self.checkpoints.saved != self.step:
            self._save_if_sound()
            self._finish_saving()
        if done and self.guard.ruined:
            self._give_up("the last update was skipped")
        self.folder.note(step=self.step, state="done" if done else "stopped")
        if done:
            self._print_table()
        else:
            saved = self.checkpoints.saved
            left = "" if saved == self.step else f" from step {saved}, since later updates were skipped"
            name = self.stop.signal_name
            self.logger.message(f"stopped by {name} after step {self.step}; run again to continue{left}")
        return done

    def _save_if_due(self) -> None:
        every = self.recipe.checkpoint.every
        if every and self.step // every > self.checkpoints.saved // every:
            self._save_if_sound()

    def _save_if_sound(self) -> None:
        """What may be ruined waits for an update that shows that it is not."""
        if not self.guard.ruined:
            self.save()

    def _finish_saving(self) -> None:
        """Wait for what is being written, also when the run is about to end with an error."""
        self.run.saver.wait()
        self._tell_saved()

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
        seconds = time.perf_counter() - started
        metrics |= {f"time/{phase}": Max(spent) for phase, spent in self._clock.items()}
        metrics["time/step"] = Max(seconds)
        metrics["memory/peak_mb"] = Max(peak_memory_mb(self.world.device))
        metrics |= self.gpus.values()
        reduced = reduce_metrics(metrics, group=self.run.grid.span)
        reduced["rollout/tokens_per_second"] = reduced["rollout/tokens"] / reduced["time/rollout"]
        if "grad_norm" not in reduced and reduced.get("fire/dropped/nonfinite"):  # no update, and perhaps no wonder
            self.guard.skip(NONFINITE)
        self._untold = reduced | self.guard.metrics()
        self._tell_step()
        self._tell_saved()
        if self.guard.exhausted:
            self._save_if_sound()
            most = self.recipe.optimizer.guard.max_skipped
            self._give_up(f"{self.guard.in_a_row} updates in a row were skipped (optimizer.guard.max_skipped={most})")

    def _tell_step(self) -> None:
        """Evaluate, where it is time for it, and log the step. What the step has measured is saved along with it until
        then: a run that is stopped in an evaluation makes it when it continues."""
        last, evaluation = self.step == self.recipe.run.steps, self.recipe.evaluation
        due = bool(evaluation.every) and self.step % evaluation.every == 0
        told = self._untold
        if self._measures and (due or (last and evaluation.at_end)):
            if self.run.exams:  # which may take long
                self._save_if_due()
            self.last_eval = self._evaluate()
            told = told | self.last_eval
        self.logger.log(self.step, told)
        self._untold = {}

    def _give_up(self, what: str) -> None:
        """End the run, since updates are skipped."""
        self._finish_saving()
        guard, kept = self.guard, self.checkpoints.newest()
        why = "loss, gradient or log-probabilities were not finite" if guard.ruined else "loss or gradient jumped"
        error = TrainingError(
            f"step {self.step}: {what}, since {why}, so the run stops; lower optimizer.lr "
            f"({self.recipe.optimizer.lr:g}) or optimizer.clip_grad, or raise warmup_steps; then "
            + (f"run again to continue from step {kept}" if kept else "start again")
        )
        error.everywhere = True  # every rank counts alike
        raise error

    def training_step(self, step: int) -> dict[str, Value]:
        """One step of distillation; returns metrics to be reduced over the student's span."""
        run, recipe = self.run, self.recipe
        rollouts, scores, routed = self._sample_and_score(step)
        self._check_stop()
        with self._timed("update"):
            self._show("update")
            rows, selection, selected = select(
                rollouts,
                scores,
                run.router.names,
                run.hooks,
                micro_batch_size=recipe.optimizer.micro_batch_size,
                grid=run.grid,
            )
            updated = self._update(rows, scores.kept, step)
        lines = sample_lines(rollouts, scores, selection, run.inputs.tokenizer.decode, most=recipe.metrics.samples)
        self.logger.samples(step + 1, lines)
        # Every rank of a replica holds the same rollouts; one of them counts.
        counts = run.grid.tp_rank == 0 and run.grid.is_first_stage
        return (rollout_metrics(rollouts) | selected if counts else {}) | routed | updated

    def _sample_and_score(self, step: int) -> tuple[Rollouts, Scores, dict[str, Value]]:
        """Rollouts of this replica and what the teachers say of them, some of whom score while it samples; and what
        that took."""
        run, prompts = self.run, self.run.prompts(step)
        mine = replica_rows(len(prompts), run.grid)
        progress = self._progress("rollout", len(mine) * self.recipe.rollout.max_new_tokens)
        own = [prompts[i] for i in mine]
        with self._timed("rollout"):
            session = run.router.open(own, mine, total=len(prompts), keep_states=True)
            rollouts = run.engine.generate(
                own,
                mine,
                sampling=run.sampling,
                step=step,
                progress=progress,
                finished=session.send,
                group_size=session.group_size,
            )
        self._wait_for_replicas()
        if self._asked_to_stop():
            session.drain()
            raise _Stopped
        with self._timed("teacher_exposed"):
            scores = session.finish(rollouts, progress=lambda name: self._show(f"teacher {name}"))
        return rollouts, scores, session.metrics()

    def _wait_for_replicas(self) -> None:
        """Until all have sampled, however long some take: devices wait for one another only so long."""
        with self._timed("rollout_wait"), self.watch.patiently("waiting for the other replicas' samples"):
            if self.run.waiting is not None:
                wait_for_all(group=self.run.waiting)

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
        run, student, reducer = self.run, self.run.student, Reducer(self.run.grid.pg.dp)
        rate = learning_rate(self.recipe.optimizer, step, self.recipe.run.steps)
        student.set_learning_rate(rate)
        parts = run.shared(mini_batches(rows, self.recipe.optimizer.mini_batches), step)
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
            metrics |= student.update(partial(self._skips, report))
            merge(metrics, report)
        return metrics

    def _skips(self, report: Mapping[str, Value], norm: float) -> bool:
        """Whether to skip the update that these are of."""
        loss, norm = agreed(report, norm, group=self.run.grid.span)
        return self.guard.judge(loss, norm) is not None

    @property
    def _measures(self) -> bool:
        """Whether there is something to evaluate."""
        return self.run.held_out is not None or bool(self.run.exams)

    def _evaluate(self) -> dict[str, float]:
        self.watch.doing("evaluation")
        measured: dict[str, Value] = {}
        if self.run.held_out is not None:
            most = (
                len(replica_rows(len(self.run.inputs.held_out), self.run.grid)) * self.recipe.evaluation.max_new_tokens
            )
            measured = self.run.held_out.measure(self._progress("evaluation", most), self._wait_for_replicas)
        counts = self.run.grid.tp_rank == 0 and self.run.grid.is_first_stage
        reduced = reduce_metrics(measured if counts else {}, group=self.run.grid.span)
        folder = self.folder.path / "evaluation" / f"step_{self.step:06d}"
        examined = take_exams(
            self.run.exams,
            folder,
            writes=self.world.is_main,
            stopped=self._asked_to_stop,
            asked=lambda: self.stop.signal_name is not None,
            progress=self._progress,
        )
        self.run.engine.release()  # long answers may have taken more memory than those of a step
        if examined is None:
            raise _Stopped
        return reduced | examined

    def _print_table(self) -> None:
        if self.last_eval and self.world.is_main:
            targets = [self.run.router.target(prompt).name for prompt in self.run.inputs.held_out]
            print(f"\n{end_tables(self.first_eval, self.last_eval, targets)}", flush=True)

    def _asked_to_stop(self) -> bool:
        """Whether any rank of the run was. Collective over the student's ranks."""
        control = self.prepared.control
        if control is not None and self.world.is_main and self.stop.signal_name is None:
            passed_on = control.asked_to_stop()
            if passed_on:
                self.stop.signal_name = f"{passed_on} to a rank without the student"
        if self.run.saver.failed and self.stop.signal_name is None:  # which all ranks then raise
            self.stop.signal_name = "a checkpoint that cannot be written"
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
