"""The optimizer's tensors as parts of the model's tensors, so that they load in any layout.

megatron-core's distributed optimizer keeps, for each parameter, the slice of its flattened values that the
data-parallel rank owns. Slices of one parameter are put together on one rank to be written as a rectangle under
the parameter's own name, and read back as a rectangle of which each rank takes its slice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

MASTER = "master"
"""Name of the float32 copy of a parameter that is kept in another dtype."""


@dataclass(frozen=True)
class Slice:
    """What this rank's optimizer holds of one parameter; ``start == end`` where it holds nothing."""

    start: int
    end: int
    tensors: Mapping[str, torch.Tensor]
    """State name -> [end - start] float32, the optimizer's own memory."""


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return list(optimizer.chained_optimizers) if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def initialise(optimizer: MegatronOptimizer) -> None:
    """Make the state that Adam would make at its first step, so that it can be filled."""
    for part in _parts(optimizer):
        if part.optimizer is None:
            continue
        part.init_state_fn(part.optimizer)
        for group in part.optimizer.param_groups if _counts_by_parameter(part.optimizer) else ():
            for parameter in group["params"]:
                # Looked for where there is any state; on the parameter's device, as the fused kernel reads it.
                zero = torch.zeros((), dtype=torch.float32, device=parameter.device)
                part.optimizer.state[parameter].setdefault("step", zero)


def _counts_by_parameter(optimizer: torch.optim.Optimizer) -> bool:
    """Whether steps are counted with each parameter, as torch's Adam does. Transformer Engine's and apex's count once
    a group, under a key that is not there before their first step."""
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)


def steps_taken(optimizer: MegatronOptimizer) -> int:
    """Adam's own count of updates, which its bias correction depends on."""
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups if part.optimizer is not None else ():
            if "step" in group:  # fused implementations count per group
                return int(group["step"])
            for parameter in group["params"]:
                if "step" in part.optimizer.state.get(parameter, {}):
                    return int(part.optimizer.state[parameter]["step"])
    return 0


def set_steps_taken(optimizer: MegatronOptimizer, steps: int) -> None:
    """Restore :func:`steps_taken`."""
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups if part.optimizer is not None else ():
            if not _counts_by_parameter(part.optimizer):
                group["step"] = steps
                continue
            for parameter in group["params"]:
                part.optimizer.state[parameter]["step"].fill_(float(steps))


def _state(part: Any, main: torch.Tensor, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    state = part.optimizer.state[main]
    tensors = {name: state[name].view(-1) for name in ("exp_avg", "exp_avg_sq")}
    if parameter.dtype != torch.float32:
        tensors[MASTER] = main.data.view(-1)
    return tensors


def _slice(part: Any, parameter: torch.nn.Parameter) -> Slice | None:
    if isinstance(part, DistributedOptimizer):
        place = part.model_param_group_index_map.get(parameter)
        if place is None:
            return None
        main = part.optimizer.param_groups[place[0]]["params"][place[1]]
        owned = part._get_model_param_range_map(parameter)["param"]
        return Slice(owned.start, owned.end, _state(part, main, parameter))
    main = getattr(parameter, "main_param", parameter)
    if main not in part.optimizer.state:
        return None
    return Slice(0, parameter.numel(), _state(part, main, parameter))


def own_slice(optimizer: MegatronOptimizer, parameter: torch.nn.Parameter) -> Slice:
    """This rank's slice of one parameter's state, after :func:`initialise`."""
    for part in _parts(optimizer):
        found = _slice(part, parameter) if part.optimizer is not None else None
        if found is not None:
            return found
    return Slice(0, 0, {})


def state_names(parameter: torch.nn.Parameter) -> tuple[str, ...]:
    """Names of the state tensors of a parameter."""
    return ("exp_avg", "exp_avg_sq") + (() if parameter.dtype == torch.float32 else (MASTER,))


def whole_state(
    optimizer: MegatronOptimizer, parameter: torch.nn.Parameter, *, group: dist.ProcessGroup, owner: int
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Put a parameter's state together on one of the ranks that hold the parameter.

    Args:
        optimizer: the student's.
        parameter: one of this rank's parameters; the ranks of the group pass the same one.
        group: the ranks that hold the parameter and share its state.
        owner: group rank that gets the result.

    Yields:
        (state name, flat [numel] float32 on the owner, None elsewhere). One reduce a state tensor.
    """
    mine = own_slice(optimizer, parameter)
    # Not told from the slice: one rank may own all of a parameter while the others wait in the reduce.
    replicated = group.size() == 1 or not any(isinstance(part, DistributedOptimizer) for part in _parts(optimizer))
    for name in state_names(parameter):
        if replicated:
            yield name, mine.tensors[name] if group.rank() == owner else None
            continue
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if mine.tensors:
            whole[mine.start : mine.end] = mine.tensors[name]
        dist.reduce(whole, dst=dist.get_global_rank(group, owner), group=group)
        yield name, whole if group.rank() == owner else None
