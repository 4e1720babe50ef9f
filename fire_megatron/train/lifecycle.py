"""Around the loop: resume, stop, save, evaluate, give up."""

from __future__ import annotations

import time

import torch.distributed as dist

from fire_megatron.config.errors import TrainingError, UserError, on_every_rank
from fire_megatron.config.roles import resolved
from fire_megatron.config.schema import Recipe
from fire_megatron.evaluation.during import measure_benchmarks
from fire_megatron.metrics.values import Max, Value, reduce_metrics
from fire_megatron.parallel.collectives import all_gather_objects, on_all_ranks
from fire_megatron.platform import launch
from fire_megatron.platform.capabilities import capability_report
from fire_megatron.platform.device import peak_memory_mb
from fire_megatron.platform.launch import World
from fire_megatron.platform.rng import seed_everything
from fire_megatron.platform.watch import Watch
from fire_megatron.teachers.transfer import Transfer
from fire_megatron.train.checkpoints import Beginning, Checkpoints
from fire_megatron.train.ending import end_tables, held_out_answers
from fire_megatron.train.fruitless import unsound_rows
from fire_megatron.train.gpu_readings import GpuReadings
from fire_megatron.train.guard import NONFINITE, SPIKE
from fire_megatron.train.inputs import rank_roles
from fire_megatron.train.interrupt import Stopped, StopRequest
from fire_megatron.train.loop import StepReport, train_step
from fire_megatron.train.run import Run
from fire_megatron.train.run_folder import RunFolder
from fire_megatron.train.samples import sample_lines
from fire_megatron.train.setup import Setup


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
            UserError: see :class:`fire_megatron.train.setup.Setup`; also a run folder that may not be continued.
        """
        recipe = resolved(recipe, world.device.kind)
        self.recipe, self.world = recipe, world
        timeout = recipe.run.collective_timeout
        self.watch = watch or launch.watch(world, roles=rank_roles(recipe, world), timeout=timeout)
        self.stop = stop or StopRequest()
        look = Beginning.of if world.is_main else lambda recipe: None
        beginning = all_gather_objects(on_all_ranks(look, recipe, group=dist.group.WORLD), group=dist.group.WORLD)[0]
        self.checkpoints = on_all_ranks(Checkpoints, recipe, world, self._say, beginning, group=dist.group.WORLD)
        self.folder = on_all_ranks(
            RunFolder, recipe, world, self._say, saved=self.checkpoints.newest(), group=dist.group.WORLD
        )
        seed_everything(recipe.run.seed, device=world.device)
        self.setup = Setup(recipe, world, self.watch, self._say, self.stop, begun=beginning.begun)
        self.step = 0
        self.evaluated = -1
        """Last step that has been evaluated, or was not to be."""
        self.first_eval: dict[str, float] = {}
        self.last_eval: dict[str, float] = {}
        self.watch.doing("resuming")
        self._unlogged: dict[str, float] = {}
        """Of the step to continue from, saved by a version that logged a step along with its evaluation."""
        resumed = on_all_ranks(self._resume, group=dist.group.WORLD)
        last = self.step - bool(self._unlogged)
        self.logger = on_all_ranks(
            self.folder.open,
            step=self.step,
            resumed=resumed,
            logged=last,
            evaluated=self.evaluated,
            group=dist.group.WORLD,
        )
        if self._unlogged:
            self.logger.log(self.step, self._unlogged)
        if self.setup.run is not None:
            self.run.phases.show = lambda text: self.logger.progress(f"step {self.step + 1}: {text}")
        self.gpus = GpuReadings(world.device, recipe.metrics, self.setup.control)

    @property
    def run(self) -> Run:
        """What the ranks of the student step with."""
        assert self.setup.run is not None, "a rank without the student has nothing to step with"
        return self.setup.run

    def _say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)

    def train(self) -> bool:
        """Run to the end, or until asked to stop. Returns whether the recipe's last step is done."""
        self._say(capability_report(self.world.device))
        self.stop.install()
        with self.gpus:
            done = self._serve() if self.setup.run is None else self._lead()
        # Given back only at an end in good order: a launcher that sees one rank fail signals the others, which shall
        # live long enough to say which it was.
        self.stop.restore()
        return done

    def _serve(self) -> bool:
        """On ranks that hold teachers only."""
        pool, control = self.setup.pool, self.setup.control
        assert control is not None

        def idle() -> None:
            if self.stop.signal_name:
                control.ask_to_stop(self.stop.signal_name)

        problem = pool.obey(control, Transfer(pool, self.setup.grid).serve, idle=idle, done=self.gpus.report)
        if problem is not None:
            raise on_every_rank(TrainingError(problem))
        return True

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
        done = False
        try:
            self._evaluate_if_due()
            while self.step < self.recipe.run.steps:
                self.run.leave_if_asked()
                self._one_step()
                self._evaluate_if_due()
                self._give_up_if_hopeless()
                self._save_if_due()
            done = True
        except Stopped:
            pass
        finally:
            self._finish_saving()
        self._end(done)
        return done

    def _one_step(self) -> None:
        """A step, and everything that is told of it."""
        started = time.perf_counter()
        report = train_step(self.run, self.step)
        self._log_samples(report)
        self.step += 1
        measured: dict[str, Value] = {
            **report.metrics,
            **self.run.phases.metrics(),
            "time/step": Max(time.perf_counter() - started),
            "memory/peak_mb": Max(peak_memory_mb(self.world.device)),
            **self.gpus.values(),
        }
        metrics = reduce_metrics(measured, group=self.run.grid.span)
        metrics["rollout/tokens_per_second"] = metrics["rollout/tokens"] / metrics["time/rollout"]
        broken = sum(unsound_rows(metrics).values())
        if "grad_norm" not in metrics and metrics["fire/dropped/nonfinite"] > broken:  # the student's own are not
            self.run.guard.skip(NONFINITE)
        for text in self.run.fruitless.step(metrics):
            self.logger.message(text)
        self.logger.log(self.step, metrics | self.run.guard.metrics())
        self._tell_saved()

    def _log_samples(self, report: StepReport) -> None:
        decode, most = self.run.inputs.tokenizer.decode, self.recipe.metrics.samples
        lines = sample_lines(report.rollouts, report.scores, report.selected.selection, decode, most=most)
        self.logger.samples(self.step + 1, lines)

    # ---- resume and save --------------------------------------------------------------------------------------

    def _resume(self) -> bool:
        """Whether there was something to continue from."""
        if self.setup.run is None:
            return bool(self.checkpoints.found)  # teachers do not change
        state = self.checkpoints.resume(self.run)
        if state is not None:
            self.step, self.first_eval = state.step, dict(state.extra["first_eval"])
            self.run.engine.publish(self.step)
            self.run.guard.load(state.extra.get("guard", {}))
            self.run.fruitless.load(state.extra.get("fruitless", {}))
            self._unlogged = dict(state.extra.get("untold", {}))
            self.evaluated = state.extra.get("evaluated", self.step - bool(self._unlogged))
        return state is not None

    def save(self) -> None:
        """Save the last completed step, or begin to. Collective over the student's ranks."""
        self.watch.doing("saving")
        extra = {
            "first_eval": self.first_eval,
            "guard": self.run.guard.state(),
            "fruitless": self.run.fruitless.state(),
            "evaluated": self.evaluated,
        }
        self.checkpoints.save(self.run, self.step, extra)
        self._tell_saved()

    def _tell_saved(self) -> None:
        for step, seconds in self.run.saver.finished():
            self.logger.message(f"saved checkpoint of step {step} to {self.checkpoints.folder} in {seconds:.1f} s")
            self.folder.note(step=self.step, saved=step, restarts=0, progress=True)

    def _save_if_due(self) -> None:
        every = self.recipe.checkpoint.every
        if every and self.step // every > self.checkpoints.saved // every:
            self._save_if_sound()

    def _save_if_sound(self) -> None:
        """What may be ruined waits for an update that shows that it is not."""
        if not self.run.guard.ruined:
            self.save()

    def _finish_saving(self) -> None:
        """Wait for what is being written, also when the run is about to end with an error.

        Raises:
            CheckpointError: on every rank, if it could not be.
        """
        self.run.saver.wait()
        self._tell_saved()

    # ---- evaluate ---------------------------------------------------------------------------------------------

    def _evaluate_if_due(self) -> None:
        """Evaluate the weights of this step, where it is time for it and it has not been done, and log it. A run that
        is stopped in an evaluation makes it when it continues."""
        config, last = self.recipe.evaluation, self.step == self.recipe.run.steps
        due = config.at_start if self.step == 0 else bool(config.every) and self.step % config.every == 0
        measures = self.run.held_out is not None or self.run.benchmarks is not None
        if measures and self.evaluated < self.step and (due or (last and self.step and config.at_end)):
            if self.step and self.run.benchmarks:  # which may take long
                self._save_if_due()
            measured = self._evaluate()
            if self.step == 0:
                self.first_eval = measured
            else:
                self.last_eval = measured
            self.logger.log(self.step, measured)
        self.evaluated = self.step

    def _evaluate(self) -> dict[str, float]:
        """``eval/...`` of the present weights, the same on every rank."""
        self.watch.doing("evaluation")
        run, measured = self.run, {}
        if run.held_out is not None:
            most = run.held_out.own_rows * self.recipe.evaluation.max_new_tokens
            measured = run.held_out.measure(run.phases.progress("evaluation", most), self._make_room)
            answer = run.inputs.tokenizer.decode(run.held_out.likeliest_answer())
            self.logger.held_out(self.step, run.inputs.held_out[0].text, answer)
        reduced = reduce_metrics(measured if run.grid.leads_rows else {}, group=run.grid.span)
        answered: dict[str, float] | None = {}
        if run.benchmarks is not None:
            answered = measure_benchmarks(
                run.benchmarks,
                run.engine,
                self.folder.path / "evaluation" / f"step_{self.step:06d}",
                stopped=run.asked_to_stop,
                asked=lambda: self.stop.signal_name is not None,
                progress=run.phases.progress,
            )
        run.engine.release()  # long answers may have taken more memory than those of a step
        if answered is None:
            raise Stopped
        return reduced | answered

    def _make_room(self) -> None:
        """For teachers on these ranks, once held-out prompts are answered: long answers take more than a step's."""
        self.run.engine.release()
        self.run.wait_for_replicas()

    # ---- the end ----------------------------------------------------------------------------------------------

    def _end(self, done: bool) -> None:
        """Save what is not saved, and say how the run ended."""
        if (self.recipe.checkpoint.final or not done) and self.checkpoints.saved != self.step:
            self._save_if_sound()
            self._finish_saving()
        if done and self.run.guard.ruined:
            self._give_up_skipping("the last update was skipped", NONFINITE)
        if done and (problem := self.run.fruitless.problem(ended=True)):
            self._give_up(problem)
        self.folder.note(step=self.step, state="done" if done else "stopped")
        if not done:
            saved = self.checkpoints.saved
            left = "" if saved == self.step else f" from step {saved}, since later updates were skipped"
            name = self.stop.signal_name
            self.logger.message(f"stopped by {name} after step {self.step}; run again to continue{left}")
        elif self.last_eval and self.world.is_main:
            targets = [self.run.router.target(prompt).name for prompt in self.run.inputs.held_out]
            print(f"\n{end_tables(self.first_eval, self.last_eval, targets)}", flush=True)
            print(held_out_answers(self.folder.path), end="", flush=True)

    def _give_up_if_hopeless(self) -> None:
        guard, most = self.run.guard, self.recipe.optimizer.guard.max_skipped
        problem = self.run.fruitless.problem()
        if guard.exhausted or problem:
            self._save_if_sound()
        if guard.exhausted:
            in_a_row, reason = guard.exhausted
            what = f"{in_a_row} updates in a row were skipped (optimizer.guard.max_skipped={most})"
            self._give_up_skipping(what, reason)
        if problem:
            self._give_up(problem)

    def _give_up_skipping(self, what: str, reason: str) -> None:
        """End the run, since updates are skipped."""
        why = {NONFINITE: "loss, gradient or log-probabilities were not finite", SPIKE: "loss or gradient jumped"}
        self._give_up(
            f"{what}, since {why[reason]}, so the run stops; lower optimizer.lr ({self.recipe.optimizer.lr:g}) or "
            "optimizer.clip_grad, or raise warmup_steps"
        )

    def _give_up(self, problem: str) -> None:
        """End the run with an error, once what is being saved is."""
        self._finish_saving()
        kept = self.checkpoints.newest()
        then = f"run again to continue from step {kept}" if kept else "start again"
        raise on_every_rank(TrainingError(f"step {self.step}: {problem}; then {then}"))
