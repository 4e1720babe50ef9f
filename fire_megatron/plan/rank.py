"""One rank of a planned run: its parts of the roles, built and run on tensors without memory.

What runs is what the real run runs: sampling, scoring and update, by the same functions on the same classes. A phase of
many equal pieces (decode steps, micro-batches) is run with one and with two of them, which tells the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.utils import get_model_config

from fire_megatron.config.hf_config import ModelShape, used_vocabulary
from fire_megatron.config.megatron_fields import ENGINE_ONLY
from fire_megatron.config.roles import keeps_cache, longest_row, roles
from fire_megatron.config.schema import Recipe, RoleConfig
from fire_megatron.data.rollouts import Target
from fire_megatron.losses.fused import OutputLayer
from fire_megatron.models.build import build_model, model_dtype
from fire_megatron.models.gpt import FireGPT
from fire_megatron.models.kv_cache import length_bucket
from fire_megatron.parallel.grid import ModelGrid
from fire_megatron.plan import pieces as scale
from fire_megatron.plan.decoding import decode_step
from fire_megatron.plan.pieces import Pieces, ceil, of_all_layers
from fire_megatron.plan.rank_plan import Decode, Phase, RankPlan, RoleMemory
from fire_megatron.plan.trace import Trace, Tracing, storage_bytes
from fire_megatron.plan.workload import Workload
from fire_megatron.plan.world import SimulatedGrids, simulated_rank
from fire_megatron.platform.device import Device, compute_device
from fire_megatron.platform.host import HostMemory
from fire_megatron.rollout.engine import MegatronEngine, uses_graphs
from fire_megatron.rollout.sampling import Sampling
from fire_megatron.teachers.messages import StateKind, split_columns
from fire_megatron.teachers.teacher import Keep, Teacher, TeacherInfo
from fire_megatron.train.inputs import role_layout
from fire_megatron.train.objective import MicroBatch
from fire_megatron.train.rebalance import Header, all_headers, share_out
from fire_megatron.train.student import Student


def planned_role(role: RoleConfig) -> RoleConfig:
    """A role whose layers can be built on any machine: Transformer Engine's have the same parameters."""
    settings = {k: v for k, v in role.megatron.items() if k not in ENGINE_ONLY and not k.startswith(("fp8", "fp4"))}
    return role.replace(layer_spec="local", megatron=settings, precision=role.precision.replace(fp8=None))


def plan_rank(
    recipe: Recipe, shapes: Mapping[str, ModelShape], workload: Workload, *, rank: int, world_size: int, kind: str
) -> RankPlan:
    """Build and run a rank's parts.

    Args:
        recipe: checked for this world.
        shapes: architecture of each role, by recipe path.
        workload: a step.
        rank: which one.
        world_size: ranks of the run.
        kind: ``cpu`` or ``cuda``.
    """
    with simulated_rank(rank, world_size, kind):
        return _Rank(recipe, shapes, workload, rank, world_size, kind).plan()


class _Rank:
    def __init__(
        self,
        recipe: Recipe,
        shapes: Mapping[str, ModelShape],
        workload: Workload,
        rank: int,
        world_size: int,
        kind: str,
    ) -> None:
        self.recipe, self.shapes, self.load, self.rank, self.kind = recipe, shapes, workload, rank, kind
        self.sampling, self.scratch = Sampling.of(recipe.rollout, seed=0, stop_ids=()), 0
        factory = SimulatedGrids()
        self.grids: dict[str, ModelGrid] = {}
        for path, role in roles(recipe).items():
            layout = role_layout(role, world_size)
            if rank in layout.ranks:
                self.grids[path] = factory.grid(layout)
        self.state_kind = StateKind.of(recipe.loss)
        self.models = {path: self._model(path) for path in self.grids}
        self.teachers = {
            name: Teacher(
                self.models[path],
                self.grids[path],
                micro_batch_tokens=config.micro_batch_tokens,
                state_kind=self.state_kind,
            )
            for name, config in sorted(recipe.teachers.items())
            if (path := f"teachers.{name}") in self.models
        }
        self.student = self._student() if "student" in self.models else None

    def _model(self, path: str) -> FireGPT:
        role = planned_role(roles(self.recipe)[path])
        model = build_model(self.shapes[path], role, self.grids[path], device=Device(self.kind))
        model.used_vocab_size = used_vocabulary(self.shapes)
        model.rotary_angles.fix(longest_row(self.recipe))
        return model

    def _student(self) -> Student:
        model, recipe = self.models["student"], self.recipe
        heads = {}
        if recipe.loss.estimator == "full" and model.post_process:
            heads = {name: OutputLayer(self._head(name, model), model.used_columns) for name in recipe.teachers}
        return Student(
            model,
            self.grids["student"],
            loss=recipe.loss,
            optimizer=recipe.optimizer,
            precision=planned_role(recipe.student).precision,
            heads=heads,
        )

    def _head(self, name: str, student: FireGPT) -> torch.Tensor:
        """A teacher's output weight on the student's last stage: the teacher's own, where it is here (see
        :func:`fire_megatron.teachers.heads.teacher_heads`)."""
        own, config, path = self.models.get(f"teachers.{name}"), self.recipe.teachers[name], f"teachers.{name}"
        rows = student.used_columns
        lent = own is not None and own.post_process and not config.offload
        if lent and (own.vocab_start, own.used_columns) == (student.vocab_start, rows):
            return own.output_weight
        dtype = model_dtype(config.precision, self.kind)
        return torch.empty((rows, self.shapes[path].hidden), dtype=dtype, device=compute_device())

    def plan(self) -> RankPlan:
        """Run every phase."""
        phases: dict[str, Phase] = {}
        if self.student is not None:
            phases["sampling"] = self._sampling()
        for name, teacher in self.teachers.items():
            phases[f"scoring {name}"] = self._scoring(name, teacher)
        if self.student is not None:
            phases["exchange"] = self._exchange()
            phases["update"] = self._update()
        memory = {path: self._memory(path) for path in self.models}  # after an update, which makes Adam's state
        groups = {path: _group_names(grid) for path, grid in self.grids.items()}
        return RankPlan(self.rank, memory, phases, self.scratch, groups)

    def _memory(self, path: str) -> RoleMemory:
        model, student, role = self.models[path], self.student, roles(self.recipe)[path]
        parameters = sum(p.numel() for p in model.parameters())
        saved, copies = self._fp8(path)
        if path != "student" or student is None:
            form = (role.checkpoint, self.grids[path].layout, role.precision, role.layer_spec, role.vocab_multiple)
            key = f"{form} {sorted(role.megatron.items())}"
            return RoleMemory(parameters, storage_bytes(model.parameters()) - saved, fp8_copies=copies, key=key)
        weights = storage_bytes(student.weights())
        teachers = [p for other, m in self.models.items() if other != "student" for p in m.parameters()]
        heads = [head.weight_VH for head in student.objective.heads.values()]
        return RoleMemory(
            parameters=parameters,
            weights=weights - saved,
            fp8_copies=copies,
            gradients=storage_bytes(student.gradients()),
            optimizer=storage_bytes(student.memory()) - weights,
            heads=storage_bytes([*heads, *teachers]) - storage_bytes(teachers),
            key=path,
        )

    def _fp8(self, path: str) -> tuple[int, int]:
        """Bytes that FP8 weights save, and those of FP8 copies: Transformer Engine multiplies by weights laid out by
        rows and, in backward, by columns."""
        fp8, model = roles(self.recipe)[path].precision.fp8, self.models[path]
        if fp8 is None or fp8.emulate:
            return 0, 0
        matrices = [p for layer in model.decoder.layers for n, p in layer.named_parameters() if ".linear_" in n]
        size = sum(p.numel() for p in matrices if p.dim() == 2)
        ways = 2 if path == "student" else 1
        if not fp8.param_gather:
            return 0, ways * size
        return size * (model.config.params_dtype.itemsize - 1), (ways - 1) * size

    @staticmethod
    def _traced(action: Callable[[], object]) -> Trace:
        with Tracing() as tracing:
            action()
        return tracing.trace

    def _of_all_layers(self, model: FireGPT, first: Callable[[], Trace], run: Callable[[], Trace]) -> Trace:
        """See :func:`of_all_layers`; notes what buffers stay."""
        total, scratch = of_all_layers(model, first, run)
        self.scratch = max(self.scratch, scratch)
        return total

    # ---- phases -----------------------------------------------------------------------------------------------

    def _sampling(self) -> Phase:
        rows = len(self.grids["student"].own_rows(self.load.rows))
        size = min(rows, self.recipe.rollout.batch_size or rows)
        whole, rest = divmod(rows, size) if size else (0, 0)
        steps = self.load.response_tokens
        batches = [(count, times) for count, times in ((size, whole), (rest, 1)) if count and times]
        model = self.models["student"]
        first = partial(self._generate, min(size, scale.FEW_ROWS), 1)
        trace = Trace.total(
            *((times, self._of_all_layers(model, first, partial(self._batch, n, steps))) for n, times in batches)
        )
        cache = self._kv_cache(size, self.load.prompt_tokens + self.recipe.rollout.max_new_tokens)
        # Rows that move to other slots leave one layer's keys or values at a time, by a copy of at most half of them.
        trace.peak += cache + cache // self._layers() // 4
        trace.flops += self._later_keys(rows)
        prompts = self._of_all_layers(model, first, partial(self._batch, size, 1)) if size else Trace()
        step = decode_step(model, self.grids["student"], self.sampling, self.load, size) if size else Trace()
        graphs = uses_graphs(self.recipe.rollout.cuda_graphs, model, on_gpu=self.kind == "cuda")
        kept = cache + (step.peak if graphs else 0) if keeps_cache(self.recipe, on_gpu=self.kind == "cuda") else 0
        return Phase(
            trace,
            pieces=steps * (whole + bool(rest)),
            rows=rows,
            kv_cache=cache,
            kept=kept,
            decode=Decode(
                operators=step.operators,
                flops=step.flops,
                graphs=graphs,
                prompt_operators=prompts.operators * (whole + bool(rest)),
                prompt_flops=prompts.flops * rows // max(size, 1),
            ),
        )

    def _batch(self, rows: int, steps: int) -> Trace:
        """Sampling of rows together, so many tokens of each; its peak is above the key/value cache. Everything is
        linear in the number of rows and in that of steps."""
        few = min(rows, scale.FEW_ROWS)
        one = self._generate(few, 1)
        two = self._generate(few, 2) if steps > 1 else one
        trace = Trace.total((1, one), (steps - 1, two), (1 - steps, one))
        trace.peak = max(
            t.peak - self._kv_cache(few, self.load.prompt_tokens + n) for t, n in ((one, 1), (two, min(2, steps)))
        )
        if rows > few:
            less, more = self._batch(few - 1, steps), rows - few
            peak = trace.peak + more * (trace.peak - less.peak)
            trace = Trace.total((1 + more, trace), (-more, less))
            trace.peak = peak
        return trace

    def _generate(self, rows: int, steps: int) -> Trace:
        model, every = self.models["student"], self.recipe.rollout.sync_every
        engine = MegatronEngine(model, self.grids["student"], sync_every=every)
        prompts, sampling = self.load.prompts(rows), replace(self.sampling, max_new_tokens=steps, batch_size=0)
        return self._traced(lambda: engine.generate(prompts, range(rows), sampling=sampling, step=0))

    def _layers(self) -> int:
        """Of the student's stage, or of the part of it that is being run; a stage has at least one."""
        return len(self.models["student"].decoder.layers)

    def _later_keys(self, rows: int) -> int:
        """Operations of decode steps on the keys that were not there yet in the first of them."""
        model, steps = self.models["student"], self.load.response_tokens
        heads = model.config.num_attention_heads // self.grids["student"].layout.tensor
        return 4 * self._layers() * rows * heads * model.config.kv_channels * ((steps - 1) * (steps - 2) // 2)

    def _kv_cache(self, rows: int, length: int) -> int:
        model, length = self.models["student"], length_bucket(length, compute_device())
        groups = max(1, model.config.num_query_groups // self.grids["student"].layout.tensor)
        return (
            2 * self._layers() * rows * groups * length * model.config.kv_channels * model.config.params_dtype.itemsize
        )

    def _scoring(self, name: str, teacher: Teacher) -> Phase:
        grid, tokens = teacher.grid, self.load.row_tokens
        replicas = grid.layout.data
        rows = ceil(round(self.load.rows * self.load.shares[name]), replicas)
        if rows == 0:
            return Phase(Trace(), 0)
        tensor = self.recipe.student.parallel.tensor

        def score(sizes: list[int]) -> Trace:
            count = sum(sizes) * replicas
            prompts = [torch.zeros(self.load.prompt_tokens, dtype=torch.int64)] * count
            responses = [torch.zeros(self.load.response_tokens, dtype=torch.int64)] * count
            keep = Keep(range(count), tensor) if self.state_kind.name != "none" else None
            return self._traced(lambda: teacher.score(prompts, responses, keep=keep))

        size = max(1, teacher.micro_batch_tokens // tokens)
        pieces = Pieces(score, rows, size)
        return Phase(self._of_all_layers(teacher.model, pieces.first, pieces), pieces=pieces.count, rows=rows)

    def _exchange(self) -> Phase:
        """The kept rows on their way to the replicas that train on them. Rows of one length might stay where they are;
        those of a real step differ, so each of them is taken to come from the replica after the one that gets it."""
        grid, load = self.grids["student"], self.load
        data, context = grid.layout.data, grid.layout.context
        headers: list[list[Header]] = [[] for _ in range(grid.row_replicas)]
        for row in range(load.kept):  # of which each replica in turn gets one, as balance() does it
            holder = context * ((row + 1) % data) + row // data % context
            headers[holder].append(Header(row, load.response_tokens, False))
        own = headers[grid.row_replica]
        rows = load.training_rows(len(own))
        rows = replace(rows, rollouts=replace(rows.rollouts, row_ids=tuple(header.row_id for header in own)))
        prompts, target = load.prompts(1) * load.kept, Target(tuple(load.shares)[:1])

        def run() -> None:
            all_headers(rows, grid=grid)
            share_out(rows, headers, prompts, lambda prompt: target, grid=grid, memory=HostMemory())

        return Phase(self._traced(run) if grid.row_replicas > 1 else Trace(), 1)

    def _update(self) -> Phase:
        recipe, grid, student = self.recipe, self.grids["student"], self.student
        assert student is not None
        parts = recipe.optimizer.mini_batches
        rows = ceil(ceil(self.load.kept, parts), grid.layout.data)
        budget = recipe.optimizer.micro_batch_tokens
        size = max(1, budget // self.load.row_tokens) if budget else recipe.optimizer.micro_batch_size

        def accumulate(sizes: list[int]) -> Trace:
            rows = self.load.training_rows(sum(sizes), self._states())
            return self._traced(lambda: student.accumulate_gradients(rows, tokens=1.0))

        pieces = Pieces(accumulate, rows, size)
        trace = self._of_all_layers(student.model, pieces.first, pieces)
        trace.peak = self._activations(pieces, alive=min(pieces.count, grid.layout.pipeline - grid.pp_rank))
        traces = [(parts, trace)]
        if parts > 1 and student.objective.reads_old:
            traces.append((parts, self._log_probs(student, rows, size)))
        with Tracing():
            student.update()  # the first makes Adam's state
        applied = self._traced(student.update)
        whole = Trace.total(*traces, (parts, applied))
        return Phase(
            whole,
            pieces.count * parts,
            rows=rows,
            loss=self._loss(student, min(size, rows)),
        )

    @staticmethod
    def _activations(pieces: Pieces, *, alive: int) -> int:
        """Peak of micro-batches through all layers, so many of which a stage holds before the first comes back."""
        one = pieces.first().peak
        if alive == 1:
            return one
        two = pieces.run([pieces.size] * 2).peak
        return max(one, two + (alive - 2) * (two - one))

    def _log_probs(self, student: Student, rows: int, size: int) -> Trace:
        def score(sizes: list[int]) -> Trace:
            rows = self.load.training_rows(sum(sizes))
            return self._traced(lambda: student.log_probs(rows))

        pieces = Pieces(score, rows, size)
        return self._of_all_layers(student.model, pieces.first, pieces)

    def _loss(self, student: Student, rows: int) -> int:
        """Peak of the loss of a micro-batch alone."""
        if not student.model.post_process:
            return 0
        batch = self.load.training_rows(rows, self._states())
        (pack,) = student.packs(batch)[:1]
        width = get_model_config(student.model).hidden_size
        dtype = student.model.config.params_dtype
        hidden = torch.empty(len(pack.select), width, dtype=dtype, device=compute_device(), requires_grad=True)
        (micro_batch,) = MicroBatch.of([pack], batch, None, 1.0)
        return self._traced(lambda: student.objective(hidden, micro_batch)).peak

    def _states(self) -> dict[str, torch.Tensor] | None:
        """What each teacher sends of a row to this rank."""
        if self.state_kind.name == "none":
            return None
        grid, states = self.grids["student"], {}
        for name, config in self.recipe.teachers.items():
            hidden, used = self.shapes[f"teachers.{name}"].hidden, used_vocabulary(self.shapes)
            dtype = model_dtype(config.precision, self.kind)
            info = TeacherInfo(name, role_layout(config, dist.get_world_size()), hidden, dtype, used, self.state_kind)
            shape = (self.load.response_tokens, info.state_width)
            whole = torch.empty(shape, dtype=info.state_dtype, device=compute_device())
            states[name] = split_columns(whole, grid.layout.tensor)[grid.tp_rank]
        return states


_DIMENSIONS = {"tp": "tensor", "pp": "pipeline", "cp": "context", "ep": "expert", "dp": "data"}
_OTHER_GROUPS = {
    "dp_cp": "data x context", "tp_cp": "tensor x context", "tp_ep": "tensor x expert", "expt_dp": "data of experts",
    "mp": "tensor x pipeline", "tp_dp_cp": "tensor x data x context", "tp_ep_pp": "tensor x expert x pipeline",
    "embd": "first and last stage",
}  # fmt: skip


def _group_names(grid: ModelGrid) -> dict[tuple[int, ...], str]:
    """What a role's groups are for, by their ranks; ``data = expert`` where two dimensions have the same."""
    names: dict[tuple[int, ...], str] = {}
    for table in (_DIMENSIONS, _OTHER_GROUPS):
        found: dict[tuple[int, ...], list[str]] = {}
        for key, name in table.items():
            group = getattr(grid.pg, key)
            if group is not None and group.size() > 1:
                found.setdefault(tuple(dist.get_process_group_ranks(group)), []).append(name)
        names = {ranks: " = ".join(found[ranks]) for ranks in found} | names
    return {tuple(grid.layout.ranks): "all ranks of the role"} | names
