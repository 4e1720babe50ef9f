"""Prompt files: what is read, and what is said about rows that cannot be."""

from __future__ import annotations

import gzip
import json
import re

import pytest

from fire_megatron.config.data import DataConfig, SourceConfig
from fire_megatron.config.errors import DataError
from fire_megatron.data.prompts import fingerprint, read_prompts

ROW = {"problem": "what is two", "label": "math"}
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is three"}]


def test_rows_keep_their_order_and_labels(read):
    prompts, report = read([ROW, {"problem": "two", "label": "code"}])
    assert [(p.index, p.label, p.token_ids, p.text) for p in prompts] == [
        (0, "math", (1, 5, 6, 7), "what is two"),
        (1, "code", (1, 7), "two"),
    ]
    assert report.by_label == {"math": 1, "code": 1} and report.too_long == 0
    assert report.token_percentiles == {50: 4, 90: 4, 100: 4}
    assert str(report) == "2 prompts (code 1, math 1); tokens p50 4, p90 4, p100 4"


LINES = json.dumps(ROW) + "\n\n" + json.dumps(ROW)
LIST = json.dumps([ROW, ROW], indent=2)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", LINES.encode()),
        ("p.jsonl", LINES.replace("\n", "\r\n").encode()),
        ("p.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("p.jsonl.gz", gzip.compress(mtime=0, data=LINES.encode())),
        ("p.json", LIST.encode()),
        ("p.json", b"\xef\xbb\xbf" + LIST.encode()),
        ("p.json.gz", gzip.compress(mtime=0, data=LIST.encode())),
    ],
)
def test_formats(read, name, content):
    assert len(read(content, name=name)[0]) == 2


def test_limit_takes_the_first_rows_and_reads_no_further(read):
    assert len(read(LINES.encode() + b"\n{not json", limit=2)[0]) == 2


def test_label_of_the_source_comes_before_the_rows(read):
    assert [p.label for p in read([ROW, {"problem": "two"}], label="code")[0]] == ["code", "code"]


@pytest.mark.parametrize(
    ("extra", "key"),
    [({"extra_info": {"opd_teacher": "code"}}, "extra_info.opd_teacher"), ({"extra.teacher": "code"}, "extra.teacher")],
)
def test_label_key_reaches_into_nested_objects(read, extra, key):
    assert read([ROW | extra], label_key=key)[0][0].label == "code"


def test_a_row_may_name_several_labels_with_weights(read):
    rows = [ROW | {"label": label} for label in ({"math": 3, "code": 1}, {"code": 2.0, "math": 0}, {"math": 0.5})]
    prompts, report = read(rows)
    assert [(p.label, p.mixture) for p in prompts] == [
        ("code+math", (("code", 0.25), ("math", 0.75))), ("code", ()), ("math", ()),
    ]  # fmt: skip
    assert [p.shares for p in prompts[1:]] == [(("code", 1.0),), (("math", 1.0),)]
    assert report.by_label == {"code+math": 1, "code": 1, "math": 1}


def test_weights_of_a_mixture_change_the_fingerprint(read):
    marks = {fingerprint(read([ROW | {"label": {"math": w, "code": 1}}])[0]) for w in (1, 2)}
    assert len(marks) == 2


def test_several_sources_are_numbered_through(tmp_path, plain_tokenizer):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(ROW))
    sources = tuple(SourceConfig(path=str(tmp_path / f"{name}.jsonl")) for name in ("a", "b"))
    prompts, _ = read_prompts(DataConfig(train=sources), sources, plain_tokenizer, {"math"})
    assert [p.index for p in prompts] == [0, 1]


# ---- chats ----------------------------------------------------------------------------------------------------------


def test_the_template_is_used_when_there_is_one(read, chat_tokenizer):
    assert read([ROW], tokenizer=chat_tokenizer)[0][0].token_ids == (3, 12, 5, 6, 7, 4, 3, 13)
    assert read([ROW], tokenizer=chat_tokenizer, chat_template="off")[0][0].token_ids == (1, 5, 6, 7)


def test_messages_and_a_system_prompt(read, chat_tokenizer):
    rows = [{"messages": CHAT, "label": "math"}, {"messages": CHAT[1:], "label": "math"}]
    own, given = read(rows, tokenizer=chat_tokenizer, system_prompt="brief")[0]
    system = (3, 14, 10, 11, 4)
    assert own.token_ids[:5] == system, "the row's own system message stands"
    assert given.token_ids[:4] == (3, 14, 11, 4) and own.token_ids[5:] == given.token_ids[4:]
    assert own.text == given.text == "what is three"


def test_one_message_needs_no_template(read):
    assert read([{"messages": CHAT[1:], "label": "math"}])[0][0].token_ids == (1, 5, 6, 9)


def test_an_empty_system_message_is_fine(read, chat_tokenizer):
    chat = [{"role": "system", "content": ""}, CHAT[1]]
    assert read([{"messages": chat, "label": "math"}], tokenizer=chat_tokenizer)[0]


def test_the_fix_offered_fits_the_tokenizer(read, chat_tokenizer):
    row = {"messages": CHAT, "label": "math"}
    with pytest.raises(DataError, match="a student whose tokenizer has one"):
        read([row])
    with pytest.raises(DataError, match="set data.chat_template to 'auto'"):
        read([row], tokenizer=chat_tokenizer, chat_template="off")


# ---- rows that are wrong --------------------------------------------------------------------------------------------


def _row(**changes) -> bytes:
    return json.dumps(ROW | changes).encode()


def _chat(*messages) -> bytes:
    return json.dumps({"messages": messages, "label": "math"}).encode()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{oops", "not valid JSON .*column 2"),
        (b"[1, 2]", r"\[1, 2\] is not a JSON object"),
        (b'"' + b"long" * 100 + b'"', r"\.\.\. is not a JSON object"),
        (b"1" * 5000, "not JSON that can be read"),
        (b'{"problem": "\xff"}', "byte 14 is not UTF-8; save the file as UTF-8"),
        ('{"problem": "é"}'.encode("utf-16"), "not UTF-8"),
        (b'{"problem": "two \\ud800", "label": "math"}', "half a surrogate pair"),
        (b'{"label": "math"}', r"neither 'problem' nor 'messages'.*keys \('label'\)"),
        (b"{}", r"neither 'problem' nor 'messages'.*keys \(none\)"),
        (_row(problem=None), "neither 'problem' nor 'messages'"),
        (_row(problem=""), "'problem' is empty"),
        (_row(problem=" \n"), "'problem' is empty"),
        (_row(problem=3), "'problem' is 3, not a text"),
        (_row(problem=CHAT), "a chat belongs under data.messages_key"),
        (b'{"problem": "two"}', r"no label: 'label' is missing.*code, math"),
        (_row(label=None), "no label"),
        (_row(label="physics"), "label 'physics' has no teacher.*code, math"),
        (_row(label=["math"]), r"'label' is \['math'\], not a label"),
        (_row(label=1), "'label' is 1, not a label"),
        (_row(label={"math": 1, "cod": 3}), "label 'cod' has no teacher"),
        (_row(label={"math": -1, "code": 3}), "'label.math' is -1; .*number of at least 0"),
        (_row(label={"math": 0}), "at least one label needs a weight above 0"),
        (_chat(), r"'messages' is \[\]"),
        (_chat("two"), r"'messages\[0\]' is 'two'; write \{role, content\}"),
        (_chat({"content": "two"}), r"'messages\[0\]' is .*write \{role, content\}"),
        (_chat({"role": "user"}), r"'messages\[0\].content' is None"),
        (_chat({"role": "user", "content": ""}), r"'messages\[0\].content' is empty"),
        (_chat(CHAT[1], {"role": "assistant", "content": "two"}), "ends with the assistant's message; remove it"),
    ],
)
def test_a_wrong_row_is_named_by_file_and_line(read, chat_tokenizer, line, message):
    with pytest.raises(DataError, match=message) as error:
        read(json.dumps(ROW).encode() + b"\n\n" + line + b"\n", tokenizer=chat_tokenizer)
    assert re.match(r".*/p\.jsonl:3: ", str(error.value)), "the blank line counts"
    assert len(str(error.value)) < 400


def test_a_prompt_without_tokens(read, make_hf_tokenizer, tmp_path):
    from fire_megatron.data.tokenizer import load_tokenizer

    silent = load_tokenizer(make_hf_tokenizer(tmp_path / "t", template="{{ '' }}"))
    with pytest.raises(DataError, match="p.jsonl:1: 'what is two' has no tokens"):
        read([ROW], tokenizer=silent)


def test_the_first_wrong_rows_are_shown_and_the_rest_counted(read):
    rows = [ROW | {"label": "physics"}] * 6 + [ROW | {"label": "law"}] * 2 + [{}]
    with pytest.raises(DataError) as error:
        read(rows)
    lines = str(error.value).splitlines()
    assert [line.split(":")[1] for line in lines[:5]] == ["1", "2", "3", "4", "5"]
    assert lines[5:] == ["... and 4 more wrong rows", "rows by label without a teacher: physics 6, law 2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.json", b"{}", "a .json file of prompts is a list"),
        ("p.json", b'[{"problem": "a"},\n {oops}]', r"p\.json:2: not valid JSON"),
        ("p.json", b'{"problem": "a"}\n{"problem": "b"}', "one object a line name the file .jsonl"),
        ("p.json", b'[{"problem": "two"},\n {"problem": "\xff"}]', r"p\.json:2: not UTF-8"),
        ("p.json", json.dumps([ROW, {}]).encode(), r"p\.json: entry 2: neither"),
        ("p.jsonl.gz", b"not gzipped", "cannot be read"),
        ("p.jsonl.gz", gzip.compress(mtime=0, data=LINES.encode() * 50)[:-20], "cannot be read"),
        ("p.jsonl", b"\n\n", "there is no row"),
        ("p.json", b"[]", "there is no row"),
    ],
)
def test_files_that_cannot_be_read(read, name, content, message):
    with pytest.raises(DataError, match=message):
        read(content, name=name)


def test_paths_that_are_no_files(tmp_path, plain_tokenizer):
    for path, message in ((tmp_path / "absent.jsonl", "cannot be read .*No such file"), (tmp_path, "cannot be read")):
        sources = (SourceConfig(path=str(path)),)
        with pytest.raises(DataError, match=message):
            read_prompts(DataConfig(train=sources), sources, plain_tokenizer, {"math"})


def test_long_prompts_are_dropped_and_counted_or_an_error(read):
    rows = [ROW, ROW | {"problem": "two"}]
    prompts, report = read(rows, max_prompt_tokens=3)
    assert [p.text for p in prompts] == ["two"] and prompts[0].index == 0
    assert report.too_long == 1 and "1 too long and dropped" in str(report)
    with pytest.raises(DataError, match="p.jsonl:1: 4 tokens, more than data.max_prompt_tokens=3"):
        read(rows, max_prompt_tokens=3, too_long="error")
    with pytest.raises(DataError, match="all 2 are longer than data.max_prompt_tokens=1; raise it"):
        read(rows, max_prompt_tokens=1)


def test_fingerprint_changes_with_text_label_and_order(read):
    sets = [
        [ROW, ROW | {"problem": "two"}],
        [ROW | {"problem": "two"}, ROW],
        [ROW, ROW | {"problem": "three"}],
        [ROW, ROW | {"problem": "two", "label": "code"}],
        [ROW],
    ]
    assert len({fingerprint(read(rows)[0]) for rows in sets}) == len(sets)
    assert fingerprint(read(sets[0])[0]) == fingerprint(read(sets[0])[0])
