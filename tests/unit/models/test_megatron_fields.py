"""The table of TransformerConfig's fields against the installed release."""

import dataclasses

from megatron.core.transformer.transformer_config import TransformerConfig

from fire_megatron.config.megatron_fields import ENGINE_ONLY, FIELDS, TRAINING_ONLY


def test_every_field_of_the_installed_release_is_in_the_table():
    """A new release's fields show up here: decide what each means for a recipe."""
    fields = {field.name for field in dataclasses.fields(TransformerConfig) if field.init}
    assert len(fields) > 200 and not fields - FIELDS.keys()
    assert {*TRAINING_ONLY, *ENGINE_ONLY} < FIELDS.keys()
