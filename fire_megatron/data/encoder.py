"""From a chat to the token ids that a student is given."""

from __future__ import annotations

from fire_megatron.config.errors import DataError
from fire_megatron.config.schema import DataConfig
from fire_megatron.data.rows import shown
from fire_megatron.data.tokenizer import Tokenizer


class Encoder:
    """Turns a chat into token ids, with the template where the recipe wants it."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer) -> None:
        self.system = config.system_prompt
        self.use_template = config.chat_template != "off" and tokenizer.has_chat_template
        self.tokenizer = tokenizer
        self.max_tokens = config.max_prompt_tokens
        self.drop = config.too_long == "drop"
        assert self.use_template or not (self.system or config.chat_template == "on")

    def _otherwise(self) -> str:
        if self.tokenizer.has_chat_template:
            return "set data.chat_template to 'auto'"
        return "use a student whose tokenizer has one"

    def __call__(self, messages: list[dict[str, str]]) -> list[int] | None:
        """At least one token id; None for a prompt that is to be dropped for its length."""
        if self.use_template:
            if self.system and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": self.system}, *messages]
            token_ids = self.tokenizer.apply_chat_template(messages)
        elif len(messages) > 1:
            raise DataError(f"a chat of several messages needs a chat template; remove the row, or {self._otherwise()}")
        else:
            token_ids = self.tokenizer.encode(messages[0]["content"])
        if not token_ids:
            raise DataError(
                f"{shown(messages[-1]['content'])} has no tokens in the student's vocabulary; remove the row"
            )
        if len(token_ids) <= self.max_tokens:
            return token_ids
        if self.drop:
            return None
        raise DataError(
            f"{len(token_ids)} tokens, more than data.max_prompt_tokens={self.max_tokens}; "
            "raise it, or set data.too_long to 'drop'"
        )
