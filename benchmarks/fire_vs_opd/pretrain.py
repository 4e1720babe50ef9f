"""Small Qwen3 models trained from scratch on worked solutions, as Hugging Face folders with their tokenizer.

Cross-entropy on the responses alone, AdamW with a linear warm-up and a cosine, fresh problems in every batch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.fire_vs_opd.tasks import ALPHABET, DOMAINS

PAD, EOS = "<pad>", "<eos>"
VOCABULARY = {token: index for index, token in enumerate([PAD, EOS, *ALPHABET])}
_IGNORED = -100


@dataclass(frozen=True)
class Training:
    """One model's shape and course."""

    labels: tuple[str, ...]
    """Domains it learns, in equal shares."""
    layers: int
    hidden: int
    steps: int
    """Planned length of the cosine."""
    batch: int = 64
    lr: float = 2e-3
    stop_at: int = 0
    """Stop at this step of the cosine, for a student that is not done; 0 goes to its end."""


def make_tokenizer() -> Any:
    """A character is a token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)


def make_model(training: Training, seed: int) -> Any:
    """A random Qwen3 with tied embeddings."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(VOCABULARY),
            hidden_size=training.hidden,
            intermediate_size=3 * training.hidden,
            num_hidden_layers=training.layers,
            num_attention_heads=training.hidden // 32,
            num_key_value_heads=training.hidden // 32,
            head_dim=32,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            pad_token_id=VOCABULARY[PAD],
            bos_token_id=None,
            eos_token_id=VOCABULARY[EOS],
        )
    )


def _batch(labels: Sequence[str], size: int, rng: random.Random, without: frozenset[str]) -> tuple[torch.Tensor, ...]:
    """[B, L] token ids, and the same with everything but the response and its end ignored."""
    rows = []
    while len(rows) < size:
        domain = DOMAINS[labels[len(rows) % len(labels)]]
        problem = domain.problem(rng)
        if problem not in without:
            rows.append((problem, domain.solution(problem, rng)))
    width = max(len(problem) + len(solution) + 1 for problem, solution in rows)
    ids = torch.full((size, width), VOCABULARY[PAD])
    targets = torch.full((size, width), _IGNORED)
    for i, (problem, solution) in enumerate(rows):
        row = torch.tensor([*(VOCABULARY[c] for c in problem + solution), VOCABULARY[EOS]])
        ids[i, : len(row)] = row
        targets[i, len(problem) : len(row)] = row[len(problem) :]
    return ids, targets


def train(training: Training, folder: Path, *, seed: int, without: frozenset[str]) -> None:
    """Train a model and save it with its tokenizer.

    Args:
        folder: Hugging Face folder to make.
        seed: of the weights and of the problems.
        without: problems that are not trained on.
    """
    model, rng = make_model(training, seed), random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup, last = 100, training.stop_at or training.steps
    progress = tqdm(range(last), desc=f"training {folder.name}", unit="step", mininterval=5)
    for step in progress:
        done = step / training.steps
        rate = training.lr * min(1, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, targets = _batch(training.labels, training.batch, rng, without)
        logits = model(ids[:, :-1]).logits  # padding is on the right, where nothing looks back from
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
