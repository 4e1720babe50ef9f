"""Measuring the student on fixed prompts."""
