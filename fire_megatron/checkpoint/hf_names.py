"""Whether a Hugging Face folder holds the tensors of its architecture, and what it is where it does not."""

from __future__ import annotations

import re
from collections.abc import Collection

import torch

from fire_megatron.checkpoint.hf_tensors import HFReader
from fire_megatron.checkpoint.maps import Tensor, is_ignored, output_sources
from fire_megatron.config.errors import CheckpointError
from fire_megatron.config.hf_config import ModelShape

_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
"""What torch.compile, DDP and DeepSpeed, FSDP, activation checkpointing and others put into the names of a model that
they hold."""
_FIRST = "model.embed_tokens.weight"


def check_names(reader: HFReader, tensors: list[Tensor], shape: ModelShape) -> None:
    """Compare what a folder holds with what the architecture has, before anything is written.

    Raises:
        CheckpointError: tensors are missing, not the architecture's, or of another shape.
    """
    wanted = {name: size for t in tensors for name, size in zip(t.sources, t.shapes, strict=True)}
    held = set(reader.names)
    missing = [name for name in wanted if name not in held]
    unknown = [name for name in reader.names if name not in wanted and not is_ignored(name, shape)]
    if missing or unknown:
        known = _known_kind(held, wanted.keys(), shape)
        if known:
            raise CheckpointError(f"{reader.folder}: {known}")
    for names, what in (
        (missing, "are missing"),
        (unknown, f"are not of a {shape.family} model as config.json has it"),
    ):
        if names:
            raise CheckpointError(
                f"{reader.folder}: {len(names)} tensors {what}: {', '.join(names[:4])}"
                f"{' ...' if len(names) > 4 else ''}; does config.json belong to these weights?"
            )
    for name, size in wanted.items():
        if reader.shape(name) != size:
            raise CheckpointError(
                f"{reader.folder}: {name} has shape {reader.shape(name)} and config.json says {size}; "
                "does config.json belong to these weights?"
            )


def _known_kind(held: Collection[str], wanted: Collection[str], shape: ModelShape) -> str | None:
    """What folders of other tensors are known to be, and what to do about it."""
    if any(".lora_" in name for name in held):
        return (
            "holds the weights of a LoRA adapter; merge them into the base model (peft: model.merge_and_unload()) and "
            "save that"
        )
    (head,) = output_sources()
    body = set(wanted) - {head}
    if body <= set(held):
        if head in held or head not in wanted:
            return None
        others = sorted(set(held) - body)
        return (
            f"{head} is missing{f' (there is {others[0]})' if others else ''}, and config.json does not tie it to the "
            "embedding: this is a base model without its head, or a model with a head of another kind; give the model "
            "with it, or set tie_word_embeddings to true in config.json if that is what it is"
        )
    bare = {f"model.{name}" for name in held}
    if body <= bare:
        return "holds a base model without its head, as AutoModel saves it (names without `model.`); save it by " + (
            "AutoModelForCausalLM" if shape.tied else f"AutoModelForCausalLM from the model that has {head} too"
        )
    inner = {name: _WRAPPERS.sub("", name) for name in held}
    first = min((name for name in inner.values() if name.endswith(_FIRST)), key=len, default=_FIRST)
    prefix = first.removesuffix(_FIRST)
    inner = {name: plain.removeprefix(prefix) for name, plain in inner.items()}
    if not body <= set(inner.values()):
        return None
    added = sorted({f"`{match[0]}`" for name in held for match in _WRAPPERS.finditer(name)})
    added += [f"`{prefix}`"] * bool(prefix)
    return (
        f"the names of its tensors carry {' and '.join(added)}, which a wrapper of the model has put there "
        "(torch.compile, DDP, FSDP or a trainer); save the model inside of it (model._orig_mod, model.module), or take "
        "that out of the names"
    )


def check_head(reader: HFReader, tensors: list[Tensor], shape: ModelShape) -> None:
    """Refuse a model that is tied by its configuration and not by its weights, which releases of transformers read
    differently. Reads both where a tied model's folder holds a head.

    Raises:
        CheckpointError: the head is not the embedding.
    """
    (head,), embedding = output_sources(), tensors[0].sources[0]
    if not shape.tied or head not in reader.names:
        return
    stored, tied = reader.read(head), reader.read(embedding)
    wide = torch.promote_types(stored.dtype, tied.dtype)
    if stored.shape != tied.shape or not torch.equal(stored.to(wide), tied.to(wide)):
        raise CheckpointError(
            f"{reader.folder}: config.json says tie_word_embeddings, and {head} is not {embedding}; set "
            f"tie_word_embeddings to false to use it (as transformers 5 does), or take {head} out of the weights"
        )
