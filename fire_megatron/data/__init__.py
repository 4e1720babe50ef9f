"""Prompts, tokenizers, order, packs, and the records that a step hands on."""
