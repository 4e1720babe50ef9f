"""Small tokenizers made on the fly and a way to read rows with them; a run of one rank."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fire_megatron.config.data import DataConfig, SourceConfig
from fire_megatron.data.prompts import PromptReport, read_prompts
from fire_megatron.data.records import Prompt
from fire_megatron.data.tokenizer import Tokenizer, load_tokenizer

LABELS = {"math", "code"}
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)
WORDS = ("what", "is", "two", "plus", "three", "be", "brief", "user", "assistant", "system")

Read = Callable[..., tuple[list[Prompt], PromptReport]]


def _make_hf_tokenizer(
    folder: Path, *, template: str | None = TEMPLATE, closing: bool = False, words: tuple[str, ...] = WORDS
) -> Path:
    """A word-level tokenizer with BOS, and with EOS at the end of every text too if ``closing``."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>" if closing else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def _make_sentencepiece(folder: Path, **options: Any) -> Path:
    """A SentencePiece model trained on a few lines, alone in its folder."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    lines = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=40, model_type="bpe", minloglevel=2, **options
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture
def make_hf_tokenizer() -> Callable[..., Path]:
    """``make_hf_tokenizer(folder, template=..., closing=False, words=...)``."""
    return _make_hf_tokenizer


@pytest.fixture
def make_sentencepiece() -> Callable[..., Path]:
    """``make_sentencepiece(folder, **options of its trainer)``."""
    return _make_sentencepiece


@pytest.fixture(scope="session")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """With a chat template."""
    return load_tokenizer(_make_hf_tokenizer(tmp_path_factory.mktemp("chat")))


@pytest.fixture(scope="session")
def plain_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Without one."""
    return load_tokenizer(_make_hf_tokenizer(tmp_path_factory.mktemp("plain"), template=None))


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """SentencePiece alone."""
    return load_tokenizer(_make_sentencepiece(tmp_path_factory.mktemp("sp")))


@pytest.fixture
def read(tmp_path: Path, plain_tokenizer: Tokenizer) -> Read:
    """``read(rows or bytes, tokenizer=None, name='p.jsonl', label=None, limit=0, **DataConfig fields)``."""

    def run(
        content: list[Any] | bytes,
        *,
        tokenizer: Tokenizer | None = None,
        name: str = "p.jsonl",
        label: str | None = None,
        limit: int = 0,
        **config: Any,
    ) -> tuple[list[Prompt], PromptReport]:
        path = tmp_path / name
        if not isinstance(content, bytes):
            content = "".join(json.dumps(row) + "\n" for row in content).encode()
        path.write_bytes(content)
        sources = (SourceConfig(path=str(path), label=label, limit=limit),)
        return read_prompts(DataConfig(train=sources, **config), sources, tokenizer or plain_tokenizer, LABELS)

    return run


@pytest.fixture(scope="module")
def grid() -> Iterator[Any]:
    """The grid of a lone rank, for models and groups; the run is left after the module."""
    from fire_megatron.parallel.grid import GridFactory, Layout
    from fire_megatron.platform import launch

    launch.start("cpu", threads=1)
    yield GridFactory(timeout=60).grid(Layout())
    launch.stop()
