"""The models of a run's roles on this rank: built, loaded, and away on the host where they wait there."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from fire_megatron.checkpoint.loading import load_weights
from fire_megatron.config.errors import RecipeError, UserError
from fire_megatron.config.hf_config import ModelShape, used_vocabulary
from fire_megatron.config.roles import longest_row, roles
from fire_megatron.config.schema import Recipe, RoleConfig
from fire_megatron.config.spans import Span
from fire_megatron.models.build import build_model, resolve_layer_spec
from fire_megatron.models.gpt import FireGPT
from fire_megatron.parallel.collectives import on_all_ranks
from fire_megatron.parallel.grid import Layout, ModelGrid
from fire_megatron.platform.device import Device
from fire_megatron.platform.offload import Offload


@dataclass(frozen=True)
class Loaded:
    """This rank's part of a model, and where it waits if it leaves the device while it is idle."""

    model: FireGPT
    offload: Offload | None


class RoleModels:
    """Which models the roles of a recipe need, and this rank's parts of them."""

    def __init__(
        self, recipe: Recipe, shapes: Mapping[str, ModelShape], grids: Mapping[str, ModelGrid], device: Device
    ) -> None:
        """Args: shapes, grids: of every role, by recipe path; device: this rank's."""
        self._recipe, self._shapes, self._grids, self._device = recipe, shapes, grids, device
        self.used_vocab_size = used_vocabulary(shapes)
        """Entries of the vocabulary that every role's softmax runs over."""
        self._keys = {path: self._key(path, role) for path, role in roles(recipe).items()}
        # One name of a shared model that says so is enough.
        self._waiting = {self._keys[path] for path, role in roles(recipe).items() if role.offload}

    def _key(self, path: str, role: RoleConfig) -> Hashable:
        """Equal for teachers that can share one model, the same checkpoint in the same form on the same ranks. The
        student's weights change, so its model is never shared."""
        layout = self._grids[path].layout
        return (
            path if path == "student" else Path(role.checkpoint).resolve(),
            layout,
            layout.tensor > 1 if role.parallel.sequence is None else role.parallel.sequence,
            role.precision,
            resolve_layer_spec(role.layer_spec, self._device),
            role.vocab_multiple,
            json.dumps(role.megatron, sort_keys=True),
        )

    def waits_on_host(self, path: str) -> bool:
        """Whether the weights of a teacher, of a recipe path, are on the host while it is idle."""
        return path != "student" and self._keys[path] in self._waiting

    def load(self, doing: Callable[[str], object], say: Callable[[str], object]) -> dict[str, Loaded]:
        """This rank's parts of the roles that it holds, by recipe path; roles of one key share a model. Teachers that
        wait on the host go there as soon as they are loaded, and the student comes last: they never have to fit
        together. Collective over the world.

        Args:
            doing: is told what this rank does.
            say: tells people.

        Raises:
            UserError: on every rank, if any cannot load one of its own.
        """
        by_key: dict[Hashable, Loaded] = {}
        problem: UserError | None = None
        for path, role in sorted(roles(self._recipe).items(), key=lambda item: item[0] == "student"):
            doing(f"loading {path}")
            say(f"loading {path} from {role.checkpoint} on {_place(self._grids[path].layout)}")
            if not self._grids[path].is_member or self._keys[path] in by_key:
                continue
            try:
                model = self._load(path, role)
            except UserError as error:  # the role's other ranks raise too; other roles may still wait for this one
                problem = problem or error
                continue
            offload = Offload(model.parameters, constant=True) if self.waits_on_host(path) else None
            if offload:
                offload.leave()
            by_key[self._keys[path]] = Loaded(model, offload)
        on_all_ranks(_reraise, problem, group=dist.group.WORLD)
        return {path: by_key[key] for path, key in self._keys.items() if key in by_key}

    def _load(self, path: str, role: RoleConfig) -> FireGPT:
        """Collective over the role's ranks; what any of them finds wrong, all of them raise."""
        grid = self._grids[path]
        model = on_all_ranks(self._build, path, role, grid, group=grid.span)
        model.used_vocab_size = self.used_vocab_size
        model.rotary_angles.fix(longest_row(self._recipe))
        load_weights(model, Path(role.checkpoint), grid=grid)
        return model

    def _build(self, path: str, role: RoleConfig, grid: ModelGrid) -> FireGPT:
        try:
            # FP8 weights of a model that only scores need neither a transposed copy nor what they were made from.
            with torch.set_grad_enabled(path == "student"):
                return build_model(self._shapes[path], role, grid, device=self._device)
        except (UserError, torch.OutOfMemoryError):  # for the latter no setting of megatron-core's is to blame
            raise
        except Exception as error:  # megatron-core checks some fields only where it uses them
            if not role.megatron:
                raise
            raise RecipeError(
                f"{path}.megatron: megatron-core cannot build the model with {dict(role.megatron)}: "
                f"{str(error) or type(error).__name__}; remove what it names"
            ) from error


def _place(layout: Layout) -> str:
    """``ranks 2-3 (pipeline 2)``."""
    sizes = {name: getattr(layout, name) for name in ("tensor", "pipeline", "context", "expert", "data")}
    split = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    return str(Span(layout.first_rank, layout.num_ranks)) + (f" ({split})" if split else "")


def _reraise(problem: UserError | None) -> None:
    if problem is not None:
        raise problem
