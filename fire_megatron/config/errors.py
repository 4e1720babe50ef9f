"""Errors that the user can fix: each message names the key, the value and the fix."""


class UserError(ValueError):
    """Something in the recipe, data, checkpoint or layout that the user can put right."""


class RecipeError(UserError):
    """A recipe key or value is wrong."""


class DataError(UserError):
    """A prompt file or tokenizer is wrong."""


class CheckpointError(UserError):
    """A checkpoint is missing, cut short, or not what the recipe says."""


class LayoutError(UserError):
    """The parallel layout or the launcher does not fit the models or the machine."""
