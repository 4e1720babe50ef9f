"""From a chat to the token ids that a student is given."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fire_megatron.config.data import DataConfig
from fire_megatron.config.errors import DataError, RecipeError
from fire_megatron.data.rows import shown
from fire_megatron.data.tokenizer import Tokenizer

_CHARACTERS = 64
"""Of a token, on the average of a text, that no tokenizer exceeds."""

_OURS = ("messages", "conversation", "add_generation_prompt", "tokenize", "chat_template")
"""What a template or its call is given anyway."""


def surely_longer(text: int, tokens: int) -> bool:
    """Whether a text of so many characters has more tokens than this: megabytes need not be tokenized to know it."""
    return text > _CHARACTERS * tokens


class Encoder:
    """Turns a chat into token ids, with the template where the recipe wants it."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        options: Mapping[str, Any] | None = None,
        *,
        key: str = "data.chat_template_kwargs",
    ) -> None:
        """Args: config: how chats are written; tokenizer: the student's; options: of the template, in place of the
        config's; key: where they stand.

        Raises:
            RecipeError: options that the template does not read.
        """
        self.options = dict(config.chat_template_kwargs if options is None else options)
        self.system = config.system_prompt
        self.use_template = config.chat_template != "off" and tokenizer.has_chat_template
        self.tokenizer = tokenizer
        self.max_tokens = config.max_prompt_tokens
        self.drop = config.too_long == "drop"
        assert self.use_template or not (self.system or config.chat_template == "on")
        read = tokenizer.chat_template if self.use_template else ""
        for name in self.options:
            if name in _OURS:
                raise RecipeError(f"{key}.{name}: is given by the run; leave it out")
            if not re.search(rf"\b{re.escape(name)}\b", read):
                why = "the chat template does not read it" if read else "prompts go through no chat template"
                raise RecipeError(f"{key}.{name}: {why}, so it has no effect; leave it out")

    def _otherwise(self) -> str:
        if self.tokenizer.has_chat_template:
            return "set data.chat_template to 'auto'"
        return "use a student whose tokenizer has one"

    def __call__(self, messages: list[dict[str, Any]]) -> list[int] | None:
        """At least one token id; None for a prompt that is to be dropped for its length."""
        length = sum(len(message["content"]) for message in messages)
        if surely_longer(length, self.max_tokens):
            return self._too_long(f"{length} characters, far more than the tokens of")
        if self.use_template:
            if self.system and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": self.system}, *messages]
            token_ids = self.tokenizer.apply_chat_template(messages, options=self.options)
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
        return self._too_long(f"{len(token_ids)} tokens, more than")

    def _too_long(self, length: str) -> None:
        if not self.drop:
            raise DataError(
                f"{length} data.max_prompt_tokens={self.max_tokens}; raise it, or set data.too_long to 'drop'"
            )
