"""Typed metric values, and where they are written."""
