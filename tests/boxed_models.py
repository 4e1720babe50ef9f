"""A model whose words are boxed numbers, and benchmarks of numbers: some of what it says by chance is right."""

from __future__ import annotations

import json
from pathlib import Path

from models import EOS, VOCABULARY, save_megatron


def make_model(folder: Path, family: str = "qwen3", **changes) -> Path:
    r"""A converted checkpoint and, beside it, the Hugging Face folder (``-hf``); most tokens say ``so\boxed{0}`` to
    ``so\boxed{3}``, each in one of many writings."""
    save_megatron(family, folder, **{"num_hidden_layers": 2, **changes})
    for place in (folder, folder.with_name(folder.name + "-hf")):
        box_words(place)
    return folder


def box_words(folder: Path) -> None:
    """Change the words of a model's tokenizer."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    words = {name: number for name, number in tokenizer["model"]["vocab"].items() if number < 50 or number == EOS}
    for number in range(50, VOCABULARY):
        value, zeros = number % 4, number // 4 - 12
        words[f"so\\boxed{{{value}{'.' + '0' * zeros if zeros else ''}}}"] = number
    tokenizer["model"]["vocab"] = words
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


def write_benchmark(path: Path, problems: int) -> Path:
    """Problems of three words, whose answers are 0 to 3 in turn."""
    rows = [{"problem": f"w{i + 6} w{i % 7 + 10} w{2 * i % 40}", "answer": str(i % 4)} for i in range(problems)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
