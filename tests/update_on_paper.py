"""Run by tests/cli/test_update_waits.py: updates on tensors without memory, where what crosses between host and
device shows, in worlds of one to four ranks. Prints as JSON what each case did. A simulated world makes a process
useless for anything else."""

import json
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from fire_megatron.config.hf_config import read_hf_config
from fire_megatron.config.load import load_recipe
from fire_megatron.config.roles import roles
from fire_megatron.plan.rank import _Rank
from fire_megatron.plan.trace import Tracing
from fire_megatron.plan.workload import Workload
from fire_megatron.plan.world import simulated_rank

ROOT = Path(__file__).resolve().parents[1]
_aten = torch.ops.aten
P2P = ("send", "receive")
DYNAMIC = {_aten.nonzero, _aten.masked_select, _aten._unique2, _aten.repeat_interleave}
"""Operators whose results the host has to know the shape of."""


class Waits(TorchDispatchMode):
    """Within the context, counts where the host would wait for a GPU in the meta device's place."""

    def __init__(self) -> None:
        """Nothing counted yet."""
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Called by torch with every operator."""
        out, kwargs = func(*args, **(kwargs or {})), kwargs or {}
        kind, packet = func.namespace, func._overloadpacket
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)] if kind == "aten" else []
        on_device = [x.device.type == "meta" for x in tensors]
        waits = packet is _aten._local_scalar_dense and all(on_device)
        waits |= packet in DYNAMIC and any(on_device)
        if packet is _aten._to_copy and out.device != tensors[0].device:
            waits |= not kwargs.get("non_blocking", False)
        if packet is _aten.copy_ and tensors[0].device != tensors[1].device:
            waits |= not (len(args) > 2 and args[2] or kwargs.get("non_blocking", False))
        if packet is _aten.index and any(i is not None and i.dtype == torch.bool for i in args[1]):
            waits |= tensors[0].device.type == "meta"
        if waits:
            frames = [f for f in traceback.extract_stack() if "megatron" in f.filename]
            place = next(f for f in reversed(frames) if not f.filename.endswith(("cpu_seam.py", "plan/world.py")))
            self.seen[f"{func} at {place.filename}:{place.lineno}"] += 1
        return out


def update(recipe: Any, shapes: dict, load: Workload, rank: int, size: int) -> dict:
    """What updates of two and of four micro-batches did, each with a step of the optimizer; messages of the last."""
    with simulated_rank(rank, size, "cuda"):
        part = _Rank(recipe, shapes, load, rank, size, "cuda")
        states = part._states()
        if states is not None:  # which wait on the host
            states = {name: torch.zeros(x.shape, dtype=x.dtype) for name, x in states.items()}
        student, found = part.student, {"lone": []}
        for name, rows in (("begun", 2), ("few", 2), ("many", 4)):
            old = [torch.zeros(load.response_tokens)] * rows if recipe.loss.estimator == "sampled" else None
            with Tracing() as tracing, Waits() as waits:
                student.accumulate_gradients(load.training_rows(rows, states), tokens=1.0, old=old)
                if old:
                    student.log_probs(load.training_rows(rows))
                student.update()
            found[name] = waits.seen
            found["lone"] += [c.operation for c in tracing.trace.calls if len(c.ranks) == 1]
        traced = tracing.trace
        found["messages"] = {
            c.operation: [calls, traced.bytes[c]] for c, calls in traced.calls.items() if c.operation in P2P
        }
    return found


SMALL = {
    "num_hidden_layers": 2, "layer_types": None, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip


def main() -> None:
    """Argument: a folder to write to. Reads a JSON mapping: name of a case -> rank, world size, and of the recipe the
    student's layout and the loss. An expert-parallel student has experts."""
    folder, results = Path(sys.argv[1]), {}
    for name in ("Qwen3-4B", "Qwen3-30B-A3B"):
        config = json.loads((ROOT / "recipes/models" / name / "config.json").read_text())
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config | SMALL))
    for name, (rank, size, layout, loss) in json.load(sys.stdin).items():
        checkpoint = folder / ("Qwen3-30B-A3B" if "expert" in layout else "Qwen3-4B")
        role = {"checkpoint": str(checkpoint), "vocab_multiple": 4, "precision": {"dtype": "float32"}}
        recipe = {
            "run": {"name": name, "dir": str(folder / "run"), "steps": 1, "device": "auto"},
            "student": {**role, "parallel": layout},
            "teachers": {"math": role},
            "data": {"train": [{"path": "prompts.jsonl"}]},
            "loss": {"hooks": [], **loss},
            "rollout": {"prompts_per_step": 4, "max_new_tokens": 6},
            "optimizer": {"micro_batch_size": 1},
        }
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        loaded = load_recipe(path)
        shapes = {key: read_hf_config(role.checkpoint) for key, role in roles(loaded).items()}
        load = Workload.of(loaded, prompt_tokens=8, response_tokens=6, counts={"math": 1})
        results[name] = update(loaded, shapes, load, rank, size)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
