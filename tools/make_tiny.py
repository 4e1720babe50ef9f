#!/usr/bin/env python3
"""Make tiny random Hugging Face checkpoints with the shapes of Qwen3-4B and Qwen3-30B-A3B, for runs on a laptop.

    python tools/make_tiny.py --out demo/tiny/hf

``student`` is a dense Qwen3 with tied embeddings; ``math`` and ``code`` are mixtures of 8 experts (Qwen3-MoE), 2 a
token. Their tokenizer is a byte-level BPE trained on the prompts of recipes/data. The weights are random, so what such
a run shows is that everything fits together, not that anything is learned. A few seconds.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

PROMPTS = Path(__file__).resolve().parents[1] / "recipes" / "data"
VOCABULARY = 512
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "pad_token_id": None,
    "bos_token_id": None,
}
DENSE = {"num_hidden_layers": 4, "intermediate_size": 128, "tie_word_embeddings": True}
EXPERTS = {
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}


def make_tokenizer():
    """A byte-level BPE over the words of the prompts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    lines = [line for path in sorted(PROMPTS.glob("*.jsonl")) for line in path.read_text(encoding="utf-8").splitlines()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((json.loads(line)["problem"] for line in lines), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def main() -> None:
    """Make the three folders, each of them whole or not at all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that gets student, math and code")
    args = parser.parse_args()

    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # a file would keep every state of a bar
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    dense, experts = (Qwen3Config, Qwen3ForCausalLM, DENSE), (Qwen3MoeConfig, Qwen3MoeForCausalLM, EXPERTS)
    tokenizer = make_tokenizer()
    for seed, (name, (config, model, changes)) in enumerate(
        {"student": dense, "math": experts, "code": experts}.items()
    ):
        torch.manual_seed(seed)
        temporary = args.out / f".tmp_{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        made = model(config(**SIZES, **changes, eos_token_id=tokenizer.eos_token_id))
        made.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(args.out / name, ignore_errors=True)
        temporary.rename(args.out / name)
        print(f"wrote {args.out / name}: {sum(p.numel() for p in made.parameters())} parameters")


if __name__ == "__main__":
    main()
