"""Sampling answers from the student."""
