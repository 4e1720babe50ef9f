"""The text of each token of a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_WAIT = 16
"""Tokens without text of their own after which :func:`token_texts` waits no longer for one that completes it."""
_LONGEST_CHARACTER = 4  # bytes, in UTF-8


def token_texts(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text of each token; together they are the text of all.

    A token that ends within a character (byte-level vocabularies have such) has no text: the token that completes the
    character has it. Nor has a special token, which ``decode`` leaves out. A token is decoded after the ones before it
    that last gave text, since many tokenizers write a token at the start of a text without its space. What is decoded
    at once is bounded, so the time grows with the number of tokens and no faster: where a decoder
    rewrites more than a few earlier tokens, that many share one text, of about their length.

    Args:
        ids: tokens of one text.
        decode: text of token ids, such as :meth:`Tokenizer.decode`.
    """
    whole = decode(ids)
    texts: list[str] = []
    context: list[int] = []  # tokens that last gave text
    waiting: list[int] = []  # tokens since
    before, written = "", 0  # text of the context, characters of the whole that are out
    for token in ids:
        waiting.append(token)
        text = decode(context + waiting)[len(before) :]
        patient = len(waiting) < _WAIT
        if not text or (patient and not whole.startswith(text, written)):
            texts.append("")
            if not patient:  # special tokens, but the last ones may begin a character
                del waiting[: 1 - _LONGEST_CHARACTER]
            continue
        texts.append(whole[written : written + len(text)])
        written += len(texts[-1])
        context, waiting = waiting, []
        before = decode(context)
    if texts:
        texts[-1] += whole[written:]
    return texts
