"""Hugging Face model shapes, and megatron-core models built from them."""
