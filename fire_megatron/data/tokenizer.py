"""Tokenizers: Hugging Face folders, or a SentencePiece model alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fire_megatron.config.errors import DataError, RecipeError

_HF_FILES = ("tokenizer.json", "tokenizer_config.json")
_SENTENCEPIECE_FILE = "tokenizer.model"
_WAIT = 16
"""Tokens without text of their own after which :func:`token_texts` waits no longer for one that completes it."""
_LONGEST_CHARACTER = 4  # bytes, in UTF-8


class Tokenizer(Protocol):
    """What training needs of a tokenizer."""

    vocab_size: int
    """One more than the largest token id, added tokens included."""
    eos_ids: tuple[int, ...]
    """Ids that end a response; at least one."""
    pad_id: int
    """The tokenizer's padding id, or the first of ``eos_ids``."""
    has_chat_template: bool
    """Whether :meth:`apply_chat_template` works."""
    chat_template: str
    """The template as it is written; empty where there is none."""

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with the tokenizer's own leading special tokens."""
        ...

    def encode_piece(self, text: str) -> list[int]:
        """Token ids of a fragment, without special tokens put around it."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        ...

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a chat, up to where the assistant begins to answer if ``add_generation_prompt``; ``options`` are
        variables that the template reads, such as ``enable_thinking``."""
        ...

    def fingerprint(self) -> str:
        """The same for two tokenizers exactly when every id stands for the same token in both."""
        ...


def _generation_eos(folder: Path) -> tuple[int, ...]:
    """``eos_token_id`` of generation_config.json, which may list several."""
    path = folder / "generation_config.json"
    if not path.exists():
        return ()
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); restore the file, or remove it") from error
    value = config.get("eos_token_id") if isinstance(config, dict) else None
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise DataError(f"{path}: eos_token_id is {value!r}; write a token id or a list of token ids")
    return tuple(ids)


def _ends(folder: Path, own: int | None) -> tuple[int, ...]:
    """The tokenizer's own end of sequence, then those of generation_config.json."""
    return tuple(dict.fromkeys([*([] if own is None else [own]), *_generation_eos(folder)]))


class HFTokenizer:
    """A tokenizer that transformers loads from local files."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError when transformers cannot load the folder."""
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # transformers raises many kinds
            raise DataError(f"{folder}: transformers cannot load the tokenizer there ({error})") from error
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        own = self._tokenizer.eos_token_id
        self.eos_ids = _ends(folder, own)
        pad = self._tokenizer.pad_token_id
        self.pad_id = pad if pad is not None else next(iter(self.eos_ids), 0)
        # Some tokenizers close a text with EOS, after which a student would have nothing to answer.
        self._closing = own if own is not None and self._tokenizer.encode("a")[-1:] == [own] else None
        self.has_chat_template = bool(self._tokenizer.chat_template)
        self.chat_template = self._tokenizer.get_chat_template() if self.has_chat_template else ""

    def encode(self, text: str) -> list[int]:
        """See :class:`Tokenizer`."""
        ids = list(self._tokenizer.encode(text))
        return ids[:-1] if ids and ids[-1] == self._closing else ids

    def encode_piece(self, text: str) -> list[int]:
        """See :class:`Tokenizer`."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """See :class:`Tokenizer`."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """See :class:`Tokenizer`. Raises DataError when the template rejects the messages."""
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                [dict(m) for m in messages],
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **(options or {}),
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise DataError(
                f"the chat template rejects these messages ({error}); change them, or data.system_prompt"
            ) from error
        return self.encode_piece(text)

    def fingerprint(self) -> str:
        """See :class:`Tokenizer`."""
        return _digest(self._tokenizer.get_vocab())


class SentencePieceTokenizer:
    """A SentencePiece model without Hugging Face files; it has no chat template."""

    has_chat_template = False
    chat_template = ""

    def __init__(self, folder: Path) -> None:
        """Raises DataError when the file is not a SentencePiece model."""
        import sentencepiece

        path = folder / _SENTENCEPIECE_FILE
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise DataError(f"{path}: not a SentencePiece model ({error})") from error
        self.vocab_size = self._model.vocab_size()
        own, pad = self._model.eos_id(), self._model.pad_id()  # -1 where the model has none
        self.eos_ids = _ends(folder, own if own >= 0 else None)
        self.pad_id = pad if pad >= 0 else next(iter(self.eos_ids), 0)

    def encode(self, text: str) -> list[int]:
        """See :class:`Tokenizer`."""
        return list(self._model.encode(text, add_bos=self._model.bos_id() >= 0))

    def encode_piece(self, text: str) -> list[int]:
        """See :class:`Tokenizer`; control pieces such as ``</s>`` are looked up by name."""
        piece = self._model.piece_to_id(text)
        return [piece] if piece != self._model.unk_id() else list(self._model.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """See :class:`Tokenizer`."""
        return self._model.decode([int(i) for i in ids])

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """There is no template."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """See :class:`Tokenizer`."""
        return _digest({self._model.id_to_piece(i): i for i in range(self.vocab_size)})


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


def _digest(vocabulary: Mapping[str, int]) -> str:
    lines = (f"{index}\t{token}" for token, index in sorted(vocabulary.items(), key=lambda item: item[1]))
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder: Hugging Face's where it has those files, else a SentencePiece model.

    Raises:
        DataError: no tokenizer there, one that cannot be read, or one that has no end-of-sequence token.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder to read a tokenizer from; correct the checkpoint's path")
    if any((folder / name).exists() for name in _HF_FILES):
        tokenizer: Tokenizer = HFTokenizer(folder)
    elif (folder / _SENTENCEPIECE_FILE).exists():
        tokenizer = SentencePieceTokenizer(folder)
    else:
        raise DataError(
            f"{folder}: no tokenizer there ({', '.join(_HF_FILES)} or {_SENTENCEPIECE_FILE}); "
            "copy the tokenizer files of the Hugging Face model into the folder"
        )
    if not tokenizer.eos_ids:
        raise DataError(
            f"{folder}: neither the tokenizer nor generation_config.json names an end-of-sequence token; "
            'add {"eos_token_id": ...} as generation_config.json'
        )
    return tokenizer


def stop_ids(tokenizer: Tokenizer, texts: Iterable[str], key: str) -> tuple[int, ...]:
    """Tokens that end an answer: the tokenizer's own and those of ``texts``.

    Raises:
        RecipeError: one of the texts is not one token; names ``key``, where they come from.
    """
    ids = list(tokenizer.eos_ids)
    for text in texts:
        pieces = tokenizer.encode_piece(text)
        if len(pieces) != 1:
            raise RecipeError(f"{key}: {text!r} is {len(pieces)} tokens for this tokenizer; a stop token must be one")
        ids.append(pieces[0])
    return tuple(dict.fromkeys(ids))
