"""Losses over a sharded vocabulary: pure tensor math with the groups passed in; nothing here imports megatron."""
