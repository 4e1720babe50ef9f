"""Conversion from and to Hugging Face checkpoints, loading at any layout, save and resume of training."""
