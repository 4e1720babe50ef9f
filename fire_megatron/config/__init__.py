"""Recipes: their schema, YAML loading, overrides and cross-field checks. Imports no torch."""
