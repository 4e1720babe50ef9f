"""Token ids are those of the tokenizer's own file, whatever class the folder names and transformers takes."""

from __future__ import annotations

import io
import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from fire_megatron.config.errors import DataError
from fire_megatron.data.tokenizer import load_tokenizer

CODE = "def fib(n):\n    return n + 1"
TEXTS = [
    CODE,
    "x != y , isn 't it ?",
    "1234567 = 1,234,567",
    "  two  spaces ",
    "Größe 日本語 🎉\r\n\tend",
    "",
    " ",
    "a<eos>b",
]
LINES = [CODE, "x != y", "the quick brown fox isn't here", "12345 67"] * 5
CLASSES = ["LlamaTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer", "TokenizersBackend", None]


def write(folder, tokenizer, *, model_type, **config):
    """A folder of a tokenizer.json, a tokenizer_config.json and a model's type."""
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"} | config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def train(tokenizer, **options):
    """A byte-pair tokenizer that has merged what it could of a few lines."""
    options = {"vocab_size": 380, "special_tokens": ["<eos>"], "show_progress": False} | options
    tokenizer.train_from_iterator(LINES, tokenizers.trainers.BpeTrainer(**options))
    return tokenizer


def bytes_tokenizer(*, use_regex=True, prefix=False):
    """Byte-level pairs; without ``use_regex`` they reach across spaces and line ends."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    return train(tokenizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def metaspace_tokenizer():
    """Pieces as SentencePiece has them, with a beginning of its own."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace()])
    special = ["<unk>", "<bos>", "<eos>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer = train(tokenizer, special_tokens=special)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return tokenizer


KINDS = {
    "bytes": bytes_tokenizer,
    "bytes-unsplit": lambda: bytes_tokenizer(use_regex=False),
    "bytes-prefix": lambda: bytes_tokenizer(prefix=True),
    "metaspace": metaspace_tokenizer,
}


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_file(tmp_path, kind, model_type):
    tokenizer = KINDS[kind]()
    for name in CLASSES:
        config = {"clean_up_tokenization_spaces": True} | ({"tokenizer_class": name} if name else {})
        folder = write(tmp_path / str(name), tokenizer, model_type=model_type, **config)
        loaded, plain = load_tokenizer(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        for text in TEXTS:
            ids = plain.encode(text).ids
            assert loaded.encode(text) == ids, (name, text)
            assert loaded.encode_piece(text) == plain.encode(text, add_special_tokens=False).ids, (name, text)
            assert loaded.decode(ids) == plain.decode(ids), (name, text)
        if kind == "bytes":
            assert all(loaded.decode(loaded.encode(text)) == text.replace("<eos>", "") for text in TEXTS), name


def test_what_the_files_say_besides_changes_no_id(tmp_path):
    """Cutting, padding, and a space in front that tokenizer_config.json would have."""
    tokenizer = bytes_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=16, pad_token="<eos>")
    loaded = load_tokenizer(write(tmp_path / "t", tokenizer, model_type="llama", add_prefix_space=True))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    assert loaded.encode(CODE) == tokenizer.encode(CODE).ids


def test_word_pieces_are_not_tidied(tmp_path):
    words = ["<unk>", "<eos>", "x", "!", "=", "##=", "y"]
    tokenizer = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    assert tokenizer.decode([2, 3, 5, 6]) == "x!= y"
    assert load_tokenizer(write(tmp_path / "t", tokenizer, model_type="llama")).decode([2, 3, 5, 6]) == "x != y"


def test_a_token_that_only_the_configuration_has(tmp_path):
    """It follows those of tokenizer.json, as transformers has it, and is special."""
    tokenizer = bytes_tokenizer()
    size = tokenizer.get_vocab_size()
    added = {str(size): {"content": "<|im_end|>", "special": True}}
    folder = write(tmp_path / "t", tokenizer, model_type="qwen2", added_tokens_decoder=added, pad_token="<pad>")
    loaded = load_tokenizer(folder)
    assert loaded.encode_piece("<|im_end|>") == [size] and loaded.decode([size]) == ""
    assert (loaded.pad_id, loaded.vocab_size) == (size + 1, size + 2)


def test_a_folder_as_transformers_5_writes_it(tmp_path):
    """Which calls the list of special tokens, and the class, as 4 does not."""
    tokenizer = bytes_tokenizer()
    tokenizer.add_tokens(["<|im_end|>"])
    config = {"extra_special_tokens": ["<|im_end|>"], "tokenizer_class": "TokenizersBackend", "backend": "tokenizers"}
    loaded = load_tokenizer(write(tmp_path / "t", tokenizer, model_type="qwen2", **config))
    [end] = loaded.encode_piece("<|im_end|>")
    assert loaded.special == {0: "<eos>", end: "<|im_end|>"} and loaded.decode([end]) == ""


def sentencepiece_folder(folder, *, model_type="llama", **options):
    """A SentencePiece model with what transformers wants beside it, and no tokenizer.json."""
    import sentencepiece

    folder.mkdir()
    model = io.BytesIO()
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, vocab_size=330, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2, **options,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder, sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_a_sentencepiece_model_keeps_its_ids(tmp_path, model_type):
    folder, model = sentencepiece_folder(tmp_path / "t", model_type=model_type)
    loaded = load_tokenizer(folder)
    for text in (CODE, "x != y", "日本語 🎉"):
        assert loaded.encode_piece(text) == model.encode(text) and loaded.decode(model.encode(text)) == text
    assert loaded.eos_ids == (model.eos_id(),)


@pytest.mark.parametrize("options", [{"add_dummy_prefix": False}, {"normalization_rule_name": "nmt_nfkc"}], ids=str)
def test_a_sentencepiece_model_that_transformers_reads_otherwise_is_refused(tmp_path, options):
    """Not every release of transformers heeds all that a model says; none may do so unnoticed."""
    folder, model = sentencepiece_folder(tmp_path / "t", remove_extra_whitespaces=True, **options)
    try:
        loaded = load_tokenizer(folder)
    except DataError as error:
        assert "other ids than the SentencePiece model" in str(error) and "tokenizer.json" in str(error)
    else:
        assert loaded.encode_piece(CODE) == model.encode(CODE)


def test_ids_beyond_the_vocabulary_decode_to_nothing(tmp_path, sentencepiece_tokenizer, plain_tokenizer):
    """A model's vocabulary is often padded beyond its tokenizer's, and may sample what no token is."""
    loaded = load_tokenizer(write(tmp_path / "t", bytes_tokenizer(), model_type="llama"))
    for tokenizer in (sentencepiece_tokenizer, plain_tokenizer, loaded):
        ids, beyond = tokenizer.encode("two"), tokenizer.vocab_size
        assert tokenizer.decode([ids[0], beyond, *ids[1:], beyond + 100, 2**31]) == tokenizer.decode(ids)
        assert tokenizer.decode([beyond]) == ""
