"""FP8: megatron-core's settings for Transformer Engine, and its emulation on a CPU."""
