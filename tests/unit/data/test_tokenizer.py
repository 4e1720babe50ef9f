"""Tokenizers from Hugging Face folders and from a SentencePiece model alone."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fire_megatron.config.errors import DataError
from fire_megatron.data.token_texts import token_texts
from fire_megatron.data.tokenizer import load_tokenizer, missing_stops, stop_ids

CHAT = [{"role": "user", "content": "what is two"}]


def test_hf_round_trip(plain_tokenizer):
    ids = plain_tokenizer.encode("what is two")
    assert ids == [1, 5, 6, 7] and plain_tokenizer.decode([*ids, 2]) == "what is two"
    assert plain_tokenizer.encode_piece("two") == [7]
    assert (plain_tokenizer.vocab_size, plain_tokenizer.eos_ids, plain_tokenizer.pad_id) == (15, (2,), 2)
    assert not plain_tokenizer.has_chat_template


def test_hf_chat_template(chat_tokenizer):
    assert chat_tokenizer.has_chat_template
    ids = chat_tokenizer.apply_chat_template(CHAT)
    assert ids == [3, 12, 5, 6, 7, 4, 3, 13], "the template's text, without a second BOS"
    assert chat_tokenizer.apply_chat_template(CHAT, add_generation_prompt=False) == ids[:-2]


def test_a_text_is_left_open_for_the_student(make_hf_tokenizer, tmp_path):
    """A tokenizer that closes texts with EOS would have the student continue after the end."""
    tokenizer = load_tokenizer(make_hf_tokenizer(tmp_path / "t", closing=True))
    assert tokenizer.encode("what is two") == [1, 5, 6, 7]


@pytest.mark.parametrize(
    ("listed", "expected"), [(4, (2, 4)), ([4, 2, 3], (2, 4, 3)), (2, (2,)), (None, (2,)), ([], (2,))]
)
def test_eos_ids_join_the_generation_config(make_hf_tokenizer, tmp_path, listed, expected):
    folder = make_hf_tokenizer(tmp_path / "t")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    assert load_tokenizer(folder).eos_ids == expected


@pytest.mark.parametrize(
    ("generation", "expected"), [(None, (2, 4, 3)), ({}, (2, 4, 3)), ({"eos_token_id": 3}, (2, 3))], ids=str
)
def test_the_models_configuration_counts_where_that_of_generation_names_none(
    make_hf_tokenizer, tmp_path, generation, expected
):
    folder = make_hf_tokenizer(tmp_path / "t")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": [4, 2, 3]}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    assert load_tokenizer(folder).eos_ids == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{{ m['role'] + ' ' + m['content'] + eos_token }} {% endfor %}", 2),
        ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' + m['content'] + ' three ' }}{% endfor %}", None),
        ("{{ messages[0]['content'] }}<|im_end|>", None),
        ("{{ raise_exception('no assistant') }}", None),
        (None, None),
    ],
    ids=["the tokenizer's", "a word", "no answers", "refuses", "no template"],
)
def test_the_end_of_a_turn(make_hf_tokenizer, tmp_path, chat_tokenizer, template, expected):
    assert chat_tokenizer.turn_end() == 4
    assert load_tokenizer(make_hf_tokenizer(tmp_path / "t", template=template)).turn_end() == expected


def test_ends_that_are_missing_are_named(chat_tokenizer, sentencepiece_tokenizer):
    endings = {"the chat template": (chat_tokenizer.turn_end(),), "teachers.math": (2, 7), "teachers.code": (2,)}
    warning = missing_stops(chat_tokenizer, {2}, endings, "rollout.stop_tokens")
    assert "(the chat template: <|im_end|>; teachers.math: two)" in warning
    assert warning.endswith('add ["<|im_end|>", "two"] to rollout.stop_tokens')
    assert stop_ids(chat_tokenizer, ["<|im_end|>", "two"], "rollout.stop_tokens") == (2, 4, 7)
    assert missing_stops(chat_tokenizer, {2, 4, 7}, endings, "rollout.stop_tokens") is None
    assert missing_stops(sentencepiece_tokenizer, {2}, {"a": [sentencepiece_tokenizer.turn_end()]}, "b") is None


@pytest.mark.parametrize("content", ['{"eos_token_id": "2"}', '{"eos_token_id": [1, true]}', "{", "\x00"])
def test_a_bad_generation_config_is_named(make_hf_tokenizer, tmp_path, content):
    folder = make_hf_tokenizer(tmp_path / "t")
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(DataError, match="generation_config.json"):
        load_tokenizer(folder)


def test_a_template_that_rejects_a_role(make_hf_tokenizer, tmp_path):
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}user"
    tokenizer = load_tokenizer(make_hf_tokenizer(tmp_path / "t", template=template))
    assert tokenizer.apply_chat_template(CHAT) == [12]
    with pytest.raises(DataError, match="no system role"):
        tokenizer.apply_chat_template([{"role": "system", "content": "be brief"}, *CHAT])


def test_fingerprint_follows_the_meaning_of_ids(make_hf_tokenizer, tmp_path, chat_tokenizer, plain_tokenizer):
    assert chat_tokenizer.fingerprint() == plain_tokenizer.fingerprint(), (
        "a chat template does not change what ids mean"
    )
    other = load_tokenizer(make_hf_tokenizer(tmp_path / "t", words=("is", "what")))
    swapped = load_tokenizer(make_hf_tokenizer(tmp_path / "u", words=("what", "is")))
    assert len({other.fingerprint(), swapped.fingerprint(), plain_tokenizer.fingerprint()}) == 3


def test_sentencepiece_alone(sentencepiece_tokenizer):
    tokenizer = sentencepiece_tokenizer
    ids = tokenizer.encode("what is two")
    assert ids[0] == 1 and tokenizer.decode([*ids, 2]) == "what is two"
    assert tokenizer.encode_piece("</s>") == [2]
    assert (tokenizer.vocab_size, tokenizer.eos_ids, tokenizer.pad_id) == (40, (2,), 2)
    assert not tokenizer.has_chat_template and len(tokenizer.fingerprint()) == 64


def test_sentencepiece_with_a_padding_piece(make_sentencepiece, tmp_path):
    assert load_tokenizer(make_sentencepiece(tmp_path / "t", pad_id=3)).pad_id == 3


def test_sentencepiece_without_end_takes_the_generation_config(make_sentencepiece, tmp_path):
    folder = make_sentencepiece(tmp_path / "t", eos_id=-1)
    with pytest.raises(DataError, match="no end-of-sequence|names an end-of-sequence"):
        load_tokenizer(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert load_tokenizer(folder).eos_ids == (9,)


def test_hf_files_come_before_the_sentencepiece_model(make_hf_tokenizer, make_sentencepiece, tmp_path):
    folder = make_hf_tokenizer(tmp_path / "t")
    shutil.copy(make_sentencepiece(tmp_path / "sp") / "tokenizer.model", folder)
    assert load_tokenizer(folder).vocab_size == 15


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, b"", "no tokenizer there"),
        ("tokenizer.model", b"nothing of the kind", "not a SentencePiece model"),
        ("tokenizer.model", b"", "SentencePiece"),
        ("tokenizer.json", b"{}", "cannot load the tokenizer"),
    ],
)
def test_folders_without_a_usable_tokenizer(tmp_path, name, content, message):
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_no_such_folder(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        load_tokenizer(tmp_path / "absent")


TEXT = "Größe 日本語 🎉 👩‍👩‍👧\n\n  x = 1  # don't .\ufffd end"


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    """Byte-level BPE without merges: most characters above ASCII take several tokens."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate([*alphabet, "<eos>"])}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("bytes")
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>").save_pretrained(folder)
    return load_tokenizer(folder)


def test_token_texts_of_bytes(byte_tokenizer):
    ids = byte_tokenizer.encode_piece(TEXT)
    texts = token_texts(ids, byte_tokenizer.decode)
    assert len(ids) == len(TEXT.encode()) == len(texts) and "".join(texts) == TEXT
    assert texts[:5] == ["G", "r", "", "ö", ""], "the byte that completes a character has it"
    ended = token_texts([*byte_tokenizer.encode_piece("日"), *byte_tokenizer.eos_ids], byte_tokenizer.decode)
    assert ended == ["", "", "日", ""]
    cut = byte_tokenizer.encode_piece("a🎉")[:3]
    assert "".join(token_texts(cut, byte_tokenizer.decode)) == byte_tokenizer.decode(cut) != "a"


def test_token_texts_of_pieces(sentencepiece_tokenizer, plain_tokenizer):
    ids = sentencepiece_tokenizer.encode_piece("what is two plus")
    texts = token_texts(ids, sentencepiece_tokenizer.decode)
    assert "".join(texts) == "what is two plus" and " is" in "".join(texts[1:]), "spaces inside a text are kept"
    assert sum(text != "" for text in texts) >= 4
    # Special tokens in the middle neither have text nor take the next word's space.
    assert token_texts([5, 2, 6, 3, 7], plain_tokenizer.decode) == ["what", "", " is", "", " two"]
    assert token_texts([], plain_tokenizer.decode) == [] and token_texts([2], plain_tokenizer.decode) == [""]


def test_token_texts_where_decoding_changes_what_came_before():
    """Such as a tokenizer that joins an apostrophe to what follows it: nothing is lost, it only comes later."""

    def decode(ids):
        return " ".join("ab'm"[i] for i in ids).replace(" ' m", "'m").replace(" b", "B")

    texts = token_texts([0, 2, 3, 1], decode)
    assert "".join(texts) == decode([0, 2, 3, 1]) == "a'mB" and texts == ["a", "", "'m", "B"]


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"])))
def test_token_texts_are_the_characters(byte_tokenizer, text):
    ids = byte_tokenizer.encode_piece(text)
    if byte_tokenizer.decode(ids) == text:  # the tokenizer joins " ." and such
        expected = [part for character in text for part in [""] * (len(character.encode()) - 1) + [character]]
        assert token_texts(ids, byte_tokenizer.decode) == expected


@settings(max_examples=200, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["bytes", "pieces", "odd"]))
def test_token_texts_are_together_the_text(byte_tokenizer, sentencepiece_tokenizer, data, kind):
    """Of any ids, with characters that are never complete, and of decoders that write anew what came before."""

    def odd(ids):
        text = "".join("ab' "[i % 4] for i in ids)
        return text.replace("ab", "é").replace("  ", " ").strip() + "!" * (len(ids) % 3)

    decode, most = {
        "bytes": (byte_tokenizer.decode, byte_tokenizer.vocab_size),
        "pieces": (sentencepiece_tokenizer.decode, sentencepiece_tokenizer.vocab_size),
        "odd": (odd, 4),
    }[kind]
    ids = data.draw(st.lists(st.integers(0, most - 1), max_size=120))
    texts = token_texts(ids, decode)
    assert "".join(texts) == decode(ids) and len(texts) == len(ids)


@pytest.mark.parametrize("kind", ["special", "continuation", "cut", "anew"])
def test_token_texts_of_tokens_without_text_take_time_in_proportion(byte_tokenizer, kind):
    byte = {character: byte_tokenizer.encode_piece(character) for character in "é🎉a"}
    ids = {
        "special": [*byte["a"], *byte_tokenizer.eos_ids * 1000, *byte["🎉"]],
        "continuation": byte["é"][1:] * 1000 + byte["a"],
        "cut": byte["🎉"][:3] * 400,
        "anew": byte["a"] * 1000,
    }[kind]
    sizes = []

    def decode(ids):
        sizes.append(len(ids))
        text = byte_tokenizer.decode(ids)
        return text[::-1] + str(len(ids)) if kind == "anew" else text

    texts = token_texts(ids, decode)
    assert "".join(texts) == decode(ids) and len(texts) == len(ids)
    assert max(sizes[1:-1]) <= 32 and len(sizes) <= 2 + 2 * len(ids)
    if kind == "special":
        assert texts[0] == "a" and texts[-1] == "🎉", "which begins after them"
