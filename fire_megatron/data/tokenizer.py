"""Tokenizers: Hugging Face folders, or a SentencePiece model alone."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fire_megatron.config.checkpoints import read_json_object
from fire_megatron.config.errors import DataError, RecipeError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as TokenizerJson
    from transformers import PreTrainedTokenizerFast

_JSON_FILE = "tokenizer.json"
_HF_FILES = (_JSON_FILE, "tokenizer_config.json")
_SENTENCEPIECE_FILE = "tokenizer.model"
_PROBE = "def fib(n):\n    return n + 1\t# x != y, don't. 12345 Größe 日本語 🎉"
"""Text that tokenizers of other rules split otherwise: code, spaces, digits, letters beyond ASCII."""


class Tokenizer(Protocol):
    """What training needs of a tokenizer."""

    vocab_size: int
    """One more than the largest token id, added tokens included."""
    eos_ids: tuple[int, ...]
    """Ids that end a response; at least one."""
    pad_id: int
    """The tokenizer's padding id, or the first of ``eos_ids``."""
    special: Mapping[int, str]
    """Tokens that stand for no text, such as ``<|im_end|>``, by id."""
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
        """Text of token ids as it was written: nothing is tidied. Special tokens, and ids that the vocabulary does not
        have, are left out."""
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

    def turn_end(self) -> int | None:
        """The special token that the chat template ends an answer with; None where it has none."""
        ...

    def fingerprint(self) -> str:
        """The same for two tokenizers exactly when every id stands for the same token in both."""
        ...


def _configured_ends(folder: Path) -> tuple[int, ...]:
    """``eos_token_id``, which may list several, of generation_config.json, or of config.json where that names none."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.exists():
            continue
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise DataError(f"{path}: not valid JSON ({error}); restore the file, or remove it") from error
        value = config.get("eos_token_id") if isinstance(config, dict) else None
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise DataError(f"{path}: eos_token_id is {value!r}; write a token id or a list of token ids")
        if ids:
            return tuple(ids)
    return ()


def _ends(folder: Path, own: int | None) -> tuple[int, ...]:
    """The tokenizer's own end of sequence, then those that the model is configured with."""
    return tuple(dict.fromkeys([*([] if own is None else [own]), *_configured_ends(folder)]))


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """transformers warns of a class other than the one that a folder names, which is on purpose here."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _renamed(folder: Path) -> dict[str, Any]:
    """transformers 4 knows the list that 5 writes as ``extra_special_tokens`` by another name."""
    import transformers

    extra = (read_json_object(folder / "tokenizer_config.json") or {}).get("extra_special_tokens")
    if not isinstance(extra, list) or int(transformers.__version__.split(".")[0]) > 4:
        return {}
    return {"extra_special_tokens": {}, "additional_special_tokens": extra}


def _read_hf(folder: Path) -> tuple[TokenizerJson, PreTrainedTokenizerFast]:
    """What encodes and decodes, and transformers' tokenizer, which knows the special tokens and the chat template.

    transformers goes by the name of a class, in releases of its own each, and splits text as that class does, whatever
    tokenizer.json says. So only the class that stands for none is asked, and not for ids. Without a tokenizer.json
    transformers makes one; of a SentencePiece model it must be one with that model's ids.
    """
    from tokenizers import Tokenizer as TokenizerJson
    from transformers import AutoTokenizer, LlamaTokenizerFast, PreTrainedTokenizerFast

    if (folder / _JSON_FILE).exists():
        described = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True, **_renamed(folder))
        inner = TokenizerJson.from_file(str(folder / _JSON_FILE))
        for _, token in sorted(described.added_tokens_decoder.items()):  # those of tokenizer_config.json alone
            if inner.token_to_id(str(token)) is None:
                inner.add_tokens([token])
        return inner, described
    wanted = _sentencepiece_ids(folder / _SENTENCEPIECE_FILE)
    reasons = []
    for kind in (AutoTokenizer, PreTrainedTokenizerFast, LlamaTokenizerFast):
        try:
            described = kind.from_pretrained(str(folder), local_files_only=True)
            inner = described.backend_tokenizer
        except Exception as error:  # transformers raises many kinds
            reasons.append(str(error))
            continue
        if wanted is None or inner.encode(_PROBE, add_special_tokens=False).ids == wanted:
            return inner, described
        reasons.append(
            f"{type(described).__name__} gives other ids than the SentencePiece model in {_SENTENCEPIECE_FILE}"
        )
    raise ValueError("; ".join(dict.fromkeys(reasons)))


class HFTokenizer:
    """A tokenizer of Hugging Face files. Where there is a tokenizer.json, its ids are that file's."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError when the folder cannot be loaded."""
        try:
            with _quiet_transformers():
                self._inner, self._described = _read_hf(folder)
        except Exception as error:  # transformers and tokenizers raise many kinds
            raise DataError(
                f"{folder}: transformers cannot load the tokenizer there ({error}); copy its files again, or save it "
                f"as {_JSON_FILE} with a release of transformers that reads it"
            ) from error
        self._inner.no_truncation()  # a file may say how to cut and to pad
        self._inner.no_padding()
        if hasattr(self._inner.decoder, "cleanup"):  # WordPiece's, which joins marks to the word before them
            self._inner.decoder.cleanup = False
        self.vocab_size = max(self._inner.get_vocab().values(), default=-1) + 1
        added = {
            index: token.content for index, token in self._inner.get_added_tokens_decoder().items() if token.special
        }
        named = {self._id(token): token for token in self._described.all_special_tokens}
        self.special = {index: token for index, token in (added | named).items() if index is not None}
        own, pad = self._id(self._described.eos_token), self._id(self._described.pad_token)
        self.eos_ids = _ends(folder, own)
        self.pad_id = pad if pad is not None else next(iter(self.eos_ids), 0)
        # Some tokenizers close a text with EOS, after which a student would have nothing to answer.
        self._closing = own if own is not None and self._inner.encode("a").ids[-1:] == [own] else None
        template = self._described.chat_template
        if isinstance(template, dict):  # several by name, of which transformers takes this one unless told
            template = template.get("default")
        self.chat_template = template or ""
        self.has_chat_template = bool(template)

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._inner.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """See :class:`Tokenizer`."""
        ids = self._inner.encode(text).ids
        return ids[:-1] if ids and ids[-1] == self._closing else ids

    def encode_piece(self, text: str) -> list[int]:
        """See :class:`Tokenizer`."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """See :class:`Tokenizer`."""
        return self._inner.decode([i for i in ids if i not in self.special])

    def _write_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, options: Mapping[str, Any]
    ) -> str:
        """The template's text. Raises DataError when it rejects the messages."""
        from jinja2 import TemplateError

        try:
            return self._described.apply_chat_template(
                [dict(m) for m in messages],
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **options,
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise DataError(
                f"the chat template rejects these messages ({error}); change them, or data.system_prompt"
            ) from error

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """See :class:`Tokenizer`. Raises DataError when the template rejects the messages."""
        text = self._write_chat(messages, add_generation_prompt=add_generation_prompt, options=options or {})
        return self.encode_piece(text)

    def turn_end(self) -> int | None:
        """See :class:`Tokenizer`."""
        chat = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "That is two."}]
        try:
            text = self._write_chat(chat, add_generation_prompt=False, options={}) if self.has_chat_template else ""
        except DataError:
            return None
        after = text.rpartition(chat[-1]["content"])
        return next((i for i in self.encode_piece(after[2]) if i in self.special), None) if after[1] else None

    def fingerprint(self) -> str:
        """See :class:`Tokenizer`."""
        return _digest(self._inner.get_vocab())


def _sentencepiece_ids(path: Path) -> list[int] | None:
    """What a SentencePiece model makes of the probe; None where the file is none (tiktoken has that name too)."""
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(_PROBE)
    except (RuntimeError, OSError):
        return None


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
        self.special = {i: self._model.id_to_piece(i) for i in range(self.vocab_size) if self._model.is_control(i)}
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
        return self._model.decode([int(i) for i in ids if i < self.vocab_size])

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """There is no template."""
        raise NotImplementedError

    def turn_end(self) -> int | None:
        """See :class:`Tokenizer`."""
        return None

    def fingerprint(self) -> str:
        """See :class:`Tokenizer`."""
        return _digest({self._model.id_to_piece(i): i for i in range(self.vocab_size)})


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
            f"{folder}: neither the tokenizer nor generation_config.json nor config.json names an end-of-sequence "
            'token; add {"eos_token_id": ...} as generation_config.json'
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


def missing_stops(
    tokenizer: Tokenizer, stops: Collection[int], endings: Mapping[str, Iterable[int | None]], setting: str
) -> str | None:
    """A warning where answers go on past what others end them with; None where nobody does.

    Args:
        tokenizer: the student's.
        stops: tokens that end an answer here.
        endings: tokens that end it for others, by who they are.
        setting: what the missing ones are to be added to.
    """
    lacking = {who: [i for i in ids if i is not None and i not in stops] for who, ids in endings.items()}
    lacking = {who: ids for who, ids in lacking.items() if ids}
    if not lacking:
        return None
    names = {i: tokenizer.special.get(i) or tokenizer.decode([i]) for ids in lacking.values() for i in ids}
    listed = "; ".join(f"{who}: {', '.join(names[i] or f'id {i}' for i in ids)}" for who, ids in lacking.items())
    return (
        f"WARNING: answers do not end where others end theirs ({listed}), so they may run on until they are cut; add "
        f"{json.dumps([name for name in names.values() if name], ensure_ascii=False)} to {setting}"
    )
