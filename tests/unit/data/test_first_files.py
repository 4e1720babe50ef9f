"""Files as they are met on the first day, and chat templates with options."""

from __future__ import annotations

import json

import pytest

from fire_megatron.config.data import DataConfig, SourceConfig
from fire_megatron.config.errors import DataError, RecipeError
from fire_megatron.data.encoder import Encoder
from fire_megatron.data.prompts import fingerprint, read_prompts
from fire_megatron.data.rows import checked_chat, look_like_answers, row_messages
from fire_megatron.data.tokenizer import load_tokenizer

ROW = {"problem": "what is two", "label": "math"}
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is three"}]
THINKING = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
"""As Qwen3's does with chats of texts."""
WORDS = ("what", "is", "two", "three", "be", "brief", "user", "assistant", "system", "<think>", "</think>")


@pytest.fixture
def thinking(make_hf_tokenizer, tmp_path):
    folder = make_hf_tokenizer(tmp_path / "thinking", template=THINKING, words=WORDS)
    text = (folder / "tokenizer.json").read_text()
    inner = json.loads(text) | {"pre_tokenizer": {"type": "WhitespaceSplit"}}
    (folder / "tokenizer.json").write_text(json.dumps(inner))
    return load_tokenizer(folder)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_parquet_trains_as_it_is(tmp_path, plain_tokenizer):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "p.parquet"
    pq.write_table(pa.Table.from_pylist([ROW, {"problem": "two", "label": "code"}]), path)
    sources = (SourceConfig(path=str(path)),)
    prompts, _ = read_prompts(DataConfig(train=sources), sources, plain_tokenizer, {"math", "code"})
    assert [(p.text, p.label) for p in prompts] == [("what is two", "math"), ("two", "code")]


def test_parquet_without_pyarrow_says_what_to_install(read, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"p\.parquet: reading Parquet needs pyarrow.*pip install pyarrow"):
        read(b"PAR1", name="p.parquet")


@pytest.mark.parametrize(("name", "sign"), [("p.csv", ","), ("p.tsv", "\t")])
def test_csv_trains_as_it_is(read, name, sign):
    lines = [["problem", "label"], ['"what is\n""two"""', "math"], ["two", "code"]]
    content = "\ufeff" + "\r\n".join(sign.join(line) for line in lines)
    prompts, _ = read(content.encode(), name=name)
    assert [(p.text, p.label) for p in prompts] == [('what is\n"two"', "math"), ("two", "code")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"problem,label\ntwo,math\nwhat, is,math\n", r"p\.csv:3: 3 values under 2 heads; put quotes"),
        (b"problem,label\ntwo\n", r"p\.csv:2: 1 values under 2 heads"),
        (b'problem,label\n"two,math\n', "cannot be read"),
        (b"problem,label\n\xff,math\n", "cannot be read"),
        (b"problem,label\n,math\n", "neither 'problem' nor 'messages'"),
    ],
)
def test_wrong_csv(read, content, message):
    with pytest.raises(DataError, match=message):
        read(content, name="p.csv")


@pytest.mark.parametrize("name", ["p.arrow", "p.xlsx", "p.jsonl.zst"])
def test_other_formats_are_named(read, name):
    with pytest.raises(DataError, match="is not read; write it as JSON Lines, CSV or Parquet"):
        read(b"x", name=name)


# ---- chats ----------------------------------------------------------------------------------------------------------


def test_parts_of_text_are_joined(read, chat_tokenizer):
    parts = [{"type": "text", "text": "what is"}, {"type": "text", "text": " three"}]
    rows = [{"messages": [CHAT[0], {"role": "user", "content": content}], "label": "math"}
            for content in (parts, ["what is ", "three"], "what is three")]  # fmt: skip
    assert len({p.token_ids for p in read(rows, tokenizer=chat_tokenizer)[0]}) == 1
    image = {"role": "user", "content": [*parts, {"type": "image_url", "image_url": {"url": "x"}}]}
    with pytest.raises(DataError, match=r"'messages\[0\].content\[2\]' is .*only parts of text can be read"):
        read([{"messages": [image], "label": "math"}])
    with pytest.raises(DataError, match=r"'messages\[0\].content' is \[\]"):
        read([{"messages": [{"role": "user", "content": []}], "label": "math"}])


def test_calls_of_tools_have_no_content():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    chat = [
        {"role": "user", "content": "1+1?", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call], "weight": 1},
        {"role": "tool", "content": "2", "tool_call_id": "1", "name": "add"},
    ]
    assert checked_chat(chat, "messages") == [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1", "name": "add"},
    ]
    with pytest.raises(DataError, match=r"'messages\[1\].content' is None"):
        checked_chat([chat[0], chat[1] | {"tool_calls": []}, chat[2]], "messages")


def test_a_chat_may_be_written_as_json(read, chat_tokenizer):
    rows = [{"messages": CHAT, "label": "math"}, {"messages": json.dumps(CHAT), "label": "math"},
            {"problem": json.dumps(CHAT), "label": "math"}]  # fmt: skip
    assert len({p.token_ids for p in read(rows, tokenizer=chat_tokenizer)[0]}) == 1
    assert row_messages({"prompt": json.dumps(CHAT)}, ["prompt"]) == CHAT
    assert read([{"problem": "[1, 2]", "label": "math"}, {"problem": '[{"two": 2}]', "label": "math"}])[0]
    with pytest.raises(DataError, match="'messages' is 'no chat'"):
        read([{"messages": "no chat", "label": "math"}])


# ---- labels, repeats, lengths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "answers"),
    [
        (["42", "7", r"\frac12"], True),
        ([42, 7.5], True),
        ([f"word{i}" for i in range(30)], True),
        (["math", "code", "law"], False),
        (["math", "code"] * 20, False),
        ([{"math": 1}, None], False),
        ([], False),
    ],
)
def test_what_looks_like_answers(values, answers):
    assert look_like_answers(values) == answers


def test_a_label_column_of_answers_is_told(read):
    with pytest.raises(DataError, match="'label' looks like answers, not labels; name the key.*data.label_key"):
        read([ROW | {"label": str(i)} for i in range(8)])
    with pytest.raises(DataError) as error:
        read([ROW | {"label": "physics"}] * 8)
    assert "looks like answers" not in str(error.value)


def test_repeated_prompts_are_noted(read):
    report = read([ROW, {"problem": "two", "label": "math"}, ROW, ROW | {"label": "code"}])[1]
    assert report.repeated == 2 and str(report).endswith("; 2 the same as earlier ones")


def test_megabytes_are_not_tokenized(read, monkeypatch, plain_tokenizer):
    long = ROW | {"problem": "two " * 1_000_000}
    monkeypatch.setattr(type(plain_tokenizer), "encode", lambda self, text: [7] if len(text) < 100 else pytest.fail())
    assert read([ROW, long])[1].too_long == 1
    with pytest.raises(DataError, match=r"p\.jsonl:1: 4000000 characters, far more than the tokens of data.max_prompt"):
        read([long], too_long="error")


# ---- options of the chat template -----------------------------------------------------------------------------------


def test_thinking_is_turned_off(read, thinking):
    on = read([ROW], tokenizer=thinking)[0][0].token_ids
    off = read([ROW], tokenizer=thinking, chat_template_kwargs={"enable_thinking": False})[0][0].token_ids
    asked = read([ROW], tokenizer=thinking, chat_template_kwargs={"enable_thinking": True})[0][0].token_ids
    assert asked == on and off[: len(on)] == on
    assert thinking.decode(off[len(on) :]).split() == ["<think>", "</think>"]


def test_a_teacher_may_be_given_another_prompt(tmp_path, thinking):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(ROW))
    config = DataConfig(train=(SourceConfig(path=str(path)),))
    views = {"math": Encoder(config, thinking, {"enable_thinking": False})}
    given = {name: read_prompts(config, config.train, thinking, {"math"}, views=view)[0]
             for name, view in (("one", {}), ("two", views))}  # fmt: skip
    (plain,), (other,) = given.values()
    assert other.token_ids == plain.token_ids == other.seen_by("code") == plain.seen_by("math")
    assert other.seen_by("math")[: len(plain.token_ids)] == plain.token_ids != other.seen_by("math")
    assert fingerprint(given["one"]) != fingerprint(given["two"])
    short = config.replace(max_prompt_tokens=len(plain.token_ids))
    views = {"math": Encoder(short, thinking, {"enable_thinking": False})}
    with pytest.raises(DataError, match="all 1 are longer"):
        read_prompts(short, config.train, thinking, {"math"}, views=views)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_thinkin": False}, r"data.chat_template_kwargs.enable_thinkin: the chat template does not read it"),
        ({"messages": []}, r"data.chat_template_kwargs.messages: is given by the run"),
    ],
)
def test_options_without_effect_are_refused(read, thinking, options, message):
    with pytest.raises(RecipeError, match=message):
        read([ROW], tokenizer=thinking, chat_template_kwargs=options)


def test_options_need_a_template(read, thinking, plain_tokenizer):
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    for more in ({"tokenizer": plain_tokenizer}, {"tokenizer": thinking, "chat_template": "off"}):
        with pytest.raises(RecipeError, match="prompts go through no chat template, so it has no effect"):
            read([ROW], **more, **options)
