"""Multi-teacher on-policy distillation on megatron-core, with FiRe (filter, then reweight)."""

__version__ = "0.1.0"
