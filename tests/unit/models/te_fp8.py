"""Run by test_te_fp8.py: students and teachers of Transformer Engine's layers in FP8, built in pretended worlds on a
pretended GPU. Prints what it finds as JSON."""

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from steps import save_state
from te_world import BLACKWELL, HOPPER, enter, forget_gpu, grid_of, pretend_gpu

from fire_megatron.checkpoint.amax import _linear_layers, _tensors, read_amax
from fire_megatron.checkpoint.loading import load_weights
from fire_megatron.checkpoint.maps import tensor_map
from fire_megatron.checkpoint.optimizer_state import MASTER, initialise, own_slice
from fire_megatron.checkpoint.resuming import load_training_state
from fire_megatron.checkpoint.shards import Shard, model_shards
from fire_megatron.checkpoint.torch_dist import ShardReader
from fire_megatron.config.checkpoints import WEIGHTS
from fire_megatron.config.hf_config import read_hf_config
from fire_megatron.config.loss import LossConfig
from fire_megatron.config.schema import FP8Config, OptimizerConfig, PrecisionConfig, RoleConfig
from fire_megatron.data.packing import pack_rows
from fire_megatron.models import build
from fire_megatron.models.fp8.settings import token_multiple, unsupported
from fire_megatron.models.kv_cache import KVCache
from fire_megatron.models.packed import packed_seq_params
from fire_megatron.parallel.grid import Layout
from fire_megatron.platform.device import Device
from fire_megatron.train.student import Student

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
TP2_PP2 = {"tensor": 2, "pipeline": 2}
GPU = Device("cuda")


def role_in(folder: Path, megatron: dict | None = None, **fp8: object) -> RoleConfig:
    """A role of Transformer Engine's layers in bfloat16, in FP8 with settings of it."""
    precision = PrecisionConfig(dtype="bfloat16", fp8=FP8Config(**fp8) if fp8 else None)
    return RoleConfig(checkpoint=str(folder), layer_spec="te", precision=precision, megatron=megatron or {})


def names(folder: Path) -> list[str]:
    """Recipes, ranks and kinds of weights at TP2 PP2 under which names or shapes are not the checkpoint's."""
    shape, wrong = read_hf_config(folder), []
    wanted = {tensor.key: tensor.shape for tensor in tensor_map(shape)}
    roles = {recipe: role_in(folder, recipe=recipe) for recipe in RECIPES}
    meta = {"init_model_with_meta_device": True}
    for recipe in ("tensorwise", "blockwise"):
        roles[f"{recipe} weights"] = role_in(folder, meta, recipe=recipe, param_gather=True)
    grids = {}
    found: dict[str, dict] = {name: {} for name in roles}
    for rank in range(4):
        grids[rank] = grid_of(rank, 4, **TP2_PP2)
        for name, role in roles.items():
            model = build.build_model(shape, role, grids[rank], device=GPU)
            kinds = {type(m).__name__ for m in model.modules()}
            if "TELayerNormColumnParallelLinear" not in kinds or model.config.fp8_recipe != role.precision.fp8.recipe:
                wrong.append(f"{name} rank {rank}: {kinds}")
            if not any(hasattr(m, "_fp8_workspaces") for m in model.modules()):
                wrong.append(f"{name} rank {rank}: FP8 copies of weights are kept elsewhere")
            found[name] |= {s.key: s.global_shape for s in model_shards(model, grid=grids[rank])}
    return wrong + [name for name, shapes in found.items() if shapes != wanted]


def place(shard: Shard, part: torch.Tensor) -> tuple[slice, ...]:
    """Where a part lies in the whole tensor."""
    return tuple(slice(o, o + n) for o, n in zip(shard.offset, part.shape, strict=True))


def whole(shards: list[Shard]) -> dict[str, torch.Tensor]:
    """Whole tensors of a model on one rank."""
    tensors = {s.key: torch.zeros(s.global_shape) for s in shards}
    for s in shards:
        part = s.real(s.view).detach()
        tensors[s.key][place(s, part)] = part
    return tensors


def student_of(role: RoleConfig, grid, folder: Path) -> Student:
    """With weights of a checkpoint and an optimizer."""
    device = GPU if role.layer_spec == "te" else Device("cpu")
    model = build.build_model(read_hf_config(folder), role, grid, device=device)
    load_weights(model, folder, grid=grid)
    return Student(model, grid, loss=LossConfig(), optimizer=OptimizerConfig(), precision=role.precision)


def save(student: Student, grid, source: Path, folder: Path) -> Path:
    """One step's checkpoint."""
    return save_state(student, grid, source=source, checkpoints=folder)


def loads(folder: Path) -> list[str]:
    """Tensors that layers of Transformer Engine at TP2 PP2 do not take as a model of local layers has saved them."""
    grid = grid_of(0, 1)
    student = student_of(RoleConfig(checkpoint=str(folder), layer_spec="local"), grid, folder)
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    saved = whole(model_shards(student.model, grid=grid))
    step, wrong, seen = save(student, grid, folder, folder.parent / f"{folder.name}-steps"), [], set()
    for rank in range(4):
        grid = grid_of(rank, 4, **TP2_PP2)
        model = build.build_model(read_hf_config(folder), role_in(folder, recipe="tensorwise"), grid, device=GPU)
        load_weights(model, step, grid=grid)
        for s in model_shards(model, grid=grid):
            part = s.real(s.view)
            seen.add(s.key)
            if not torch.equal(part, saved[s.key][place(s, part)].bfloat16()):
                wrong.append(f"rank {rank} {s.key}")
    return wrong + sorted(set(saved) - seen)


def contexts(model, folder: Path) -> dict:
    """The FP8 state in which each layer of a first stage runs a pack in training, and in generation."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager as State

    seen: list[list] = []

    def look(hidden_states: torch.Tensor, **_: object) -> tuple:
        on, group = State.is_fp8_enabled(), State.get_fp8_group()
        ranks = dist.get_process_group_ranks(group) if on and group is not None else None
        seen.append([type(State.get_fp8_recipe()).__name__ if on else None, ranks])
        return hidden_states, None

    for layer in model.decoder.layers:
        layer.forward = look
    rows = [torch.arange(6, 13)]
    pack = pack_rows(rows, rows, [0], multiple=token_multiple(model.config), device=torch.device("cpu"))
    run = {"packed": packed_seq_params(pack)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        unsupported("mxfp8")
        model(pack.token_ids, pack.position_ids, **run)
    old = [str(w.message) for w in caught if w.category is DeprecationWarning and "fire_megatron" in w.filename]
    trained, seen = list(seen), seen[:0]
    with model.cached(KVCache(2, 99)):
        model(pack.token_ids, pack.position_ids, **run)
    return {"trained": trained, "sampled": list(seen), "tokens": pack.token_ids.shape[1], "old": old}


def amax_groups(folder: Path) -> dict:
    """Contexts of a student at TP2 PP2 DP2 on ranks 0-7 and a teacher at TP2 PP2 on ranks 8-11, on a first stage."""
    from transformer_engine.pytorch import distributed

    distributed._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    shape, report = read_hf_config(folder), {}
    student = Layout(tensor=2, pipeline=2, num_ranks=8)
    teacher = Layout(tensor=2, pipeline=2, first_rank=8, num_ranks=4)
    cases = {f"student {recipe}": (2, {"recipe": recipe}, {}) for recipe in RECIPES}
    cases["student first_last"] = (2, {"recipe": "tensorwise", "first_last_bf16": 1}, {})
    cases["student tp_only"] = (2, {"recipe": "delayed"}, {"tp_only_amax_red": True})
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    cases["student recompute"] = (2, {"recipe": "tensorwise"}, full)
    cases["teacher tensorwise"] = (9, {"recipe": "tensorwise"}, {})
    for name, (rank, fp8, megatron) in cases.items():
        factory = enter(rank, 12)
        grids = {layout: factory.grid(layout) for layout in (student, teacher)}
        grid = grids[student if name.startswith("student") else teacher]
        model = build.build_model(shape, role_in(folder, megatron, **fp8), grid, device=GPU)
        report[name] = contexts(model.train(), folder)
    return report


def quantize_on_cpu() -> None:
    """Stand in for the kernel that makes FP8 tensors with a scale for the tensor."""
    import transformer_engine.pytorch.tensor.float8_tensor as float8

    class Kernels:
        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        @staticmethod
        def quantize(values, quantizer, output=None, noop=None):
            if output is None:
                output = float8.Float8Tensor(
                    shape=values.shape, dtype=values.dtype, data=torch.empty(values.shape, dtype=torch.uint8),
                    fp8_scale_inv=torch.ones(1), fp8_dtype=quantizer.dtype, quantizer=quantizer,
                )  # fmt: skip
            scale = 448.0 / values.float().abs().max().clamp(min=1e-9)
            output._data.copy_((values.float() * scale).to(torch.float8_e4m3fn).view(torch.uint8))
            output._scale_inv.fill_(1 / scale)
            return output

    real, float8.tex = float8.tex, Kernels()


def fp8_weights(folder: Path) -> dict:
    """A student of FP8 weights, loaded, saved and resumed: what its weights stand for against a bfloat16 one's."""
    grid = grid_of(0, 1)
    low, high = role_in(folder, recipe="tensorwise", param_gather=True), role_in(folder)
    student, plain = student_of(low, grid, folder), student_of(high, grid, folder)
    report = {
        "quantised": sorted({type(p).__name__ for p in student.model.parameters()}),
        "error": apart(student.model, plain.model),
        "distributed": [
            student.ddp.ddp_config.use_distributed_optimizer,
            student.ddp.ddp_config.fp8_param_gather,
            student.optimizer.chained_optimizers[0].config.fp8_recipe,
        ],
        "kept": any(hasattr(p, "_high_precision_init_val") for p in student.model.parameters()),
        "masters": all(
            torch.equal(master, p.detach().float().flatten())
            for master, p in zip(masters(student), plain.model.parameters(), strict=True)
        ),
    }
    for master in masters(student):  # as an update would
        master.mul_(1.0 + 2**-12)
    step = save(student, grid, folder, folder.parent / "fp8-steps")
    again, other = student_of(low, grid, folder), student_of(high, grid, folder)
    for each in (again, other):
        load_training_state(step, each.model, each.optimizer, grid=grid)
    report["resumed"] = all(torch.equal(a, b) for a, b in zip(masters(student), masters(again), strict=True))
    report["in bfloat16"] = all(
        torch.equal(p, master.view(p.shape).bfloat16())
        for master, p in zip(masters(student), other.model.parameters(), strict=True)
    )
    report["resumed error"] = apart(again.model, other.model)
    return report


def masters(student: Student) -> list[torch.Tensor]:
    """The optimizer's own float32 weights, flat, in the order of the parameters."""
    initialise(student.optimizer)
    return [own_slice(student.optimizer, p).tensors[MASTER] for p in student.model.parameters()]


def apart(low: torch.nn.Module, high: torch.nn.Module) -> float:
    """Largest difference of weights over the largest weight of a matrix."""
    pairs = zip(low.parameters(), high.parameters(), strict=True)
    return max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)


def fp8_shards(folder: Path) -> list[float]:
    """By rank of TP2 PP2: how far a teacher's FP8 weights are from what they were loaded from."""
    far = []
    for rank in range(4):
        grid, models = grid_of(rank, 4, **TP2_PP2), []
        for role in (role_in(folder, recipe="tensorwise", param_gather=True), role_in(folder)):
            with torch.set_grad_enabled(False):
                models.append(build.build_model(read_hf_config(folder), role, grid, device=GPU))
            load_weights(models[-1], folder, grid=grid)
        assert not any(hasattr(p, "_high_precision_init_val") for p in models[0].parameters())
        far.append(apart(*models))
    return far


def histories(folder: Path) -> dict:
    """Scales and histories of delayed scaling, saved by one rank and read by others."""
    role = role_in(folder, recipe="delayed", amax_history=4)
    grid = grid_of(0, 1)
    student = student_of(role, grid, folder)
    empty = ShardReader(save(student, grid, folder, folder.parent / "no-history") / WEIGHTS)
    read_amax(empty, student.model)  # makes the tensors, as a first pass would
    for key, module in _linear_layers(student.model):
        for _, tensor in _tensors(key, module):
            tensor.copy_(torch.rand_like(tensor))

    def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {n: t.clone() for key, m in _linear_layers(model) for n, t in _tensors(key, m)}

    saved = state(student.model)
    step = save(student, grid, folder, folder.parent / "history")
    again = student_of(role, grid, folder)
    load_training_state(step, again.model, again.optimizer, grid=grid)
    report = {
        "tensors": len(saved),
        "before": [name for name in empty.tensors if name.startswith("fp8.")],
        "same": all(torch.equal(t, saved[n]) for n, t in state(again.model).items()) and len(state(again.model)),
    }
    grid = grid_of(3, 4, **TP2_PP2)
    last = build.build_model(read_hf_config(folder), role, grid, device=GPU)
    read_amax(ShardReader(step / WEIGHTS), last)
    report["last stage"] = sorted({int(name.split(".")[1]) for name in state(last)})
    report["last same"] = all(torch.equal(t, saved[n]) for n, t in state(last).items())
    longer = build.build_model(read_hf_config(folder), role_in(folder, recipe="delayed"), grid, device=GPU)
    read_amax(ShardReader(step / WEIGHTS), longer)
    report["longer"] = {float(t.sum()) for n, t in state(longer).items() if n.endswith("history")} == {0.0}
    return report


def refusals() -> dict[str, str | None]:
    """What GPUs say of recipes."""
    said = {}
    for capability, recipe in (((8, 0), "tensorwise"), (HOPPER, "mxfp8"), (HOPPER, "blockwise"), (BLACKWELL, "mxfp8")):
        pretend_gpu(capability)
        forget_gpu()
        said[f"{capability[0]} {recipe}"] = build.this_machine(GPU).no_fp8(recipe)
    return said


def main() -> None:
    """The argument is a folder with a converted checkpoint of each family."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    root, families = Path(sys.argv[1]), sys.argv[2:]
    pretend_gpu(BLACKWELL)
    report: dict = {"names": {}, "loads": {}}
    for family in families:
        report["names"][family] = names(root / family)
        report["loads"][family] = loads(root / family)
    report["amax"] = amax_groups(root / families[0])
    report["histories"] = histories(root / families[0])
    quantize_on_cpu()
    report["weights"] = fp8_weights(root / families[0])
    report["weight shards"] = {family: fp8_shards(root / family) for family in families}
    report["refusals"] = refusals()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
