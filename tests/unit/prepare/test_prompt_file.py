"""From rows of data sets to prompts: what is kept, what is rejected and why."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fire_megatron.config.data import DataConfig, SourceConfig
from fire_megatron.config.errors import DataError
from fire_megatron.data.prompts import read_prompts
from fire_megatron.data.rows import Reason
from fire_megatron.prepare.prompt_file import PromptFileOptions, make_prompt_file
from fire_megatron.prepare.row_keys import KeyChoice
from fire_megatron.prepare.tally import PrepareReport

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
ROW = {"problem": "What is two?", "label": "math", "answer": "2"}
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "What is three?"}]
VERL = {
    "data_source": "set",
    "prompt": [{"role": "user", "content": "What is two?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "34"},
    "extra_info": {"index": 0, "split": "train", "opd_teacher": "math"},
}
Prepared = tuple[list[dict[str, Any]], PrepareReport]
Run = Callable[..., Prepared]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """``run(rows or bytes, name='in.jsonl', **options)``: the lines written and the report."""

    def prepared(content: list[Any] | bytes, *, name: str = "in.jsonl", **options: Any) -> Prepared:
        path = tmp_path / name
        if not isinstance(content, bytes):
            content = "".join(json.dumps(row) + "\n" for row in content).encode()
        path.write_bytes(content)
        out = tmp_path / "out.jsonl"
        report = make_prompt_file(PromptFileOptions(inputs=(str(path),), out=out, overwrite=True, **options))
        return [json.loads(line) for line in out.read_text("utf-8").splitlines()], report

    return prepared


def _rejected(report: PrepareReport) -> dict[str, int]:
    return {reason: found.rows for reason, found in report.rejects.items()}


# ---- what is kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "prompt", "keys"),
    [
        (
            ROW,
            {"problem": "What is two?", "label": "math", "answer": "2"},
            "prompt=problem  label=label  answer=answer",
        ),
        (
            VERL,
            {"problem": "What is two?", "label": "math", "answer": "34"},
            "prompt=prompt  label=extra_info.opd_teacher  answer=reward_model.ground_truth",
        ),
        (
            {"prompt": "hi", "opd_teacher": "code"},
            {"problem": "hi", "label": "code"},
            "prompt=prompt  label=opd_teacher",
        ),
        ({"messages": CHAT, "label": "a"}, {"messages": CHAT, "label": "a"}, "prompt=messages  label=label"),
        (
            VERL | {"label": "34"},
            {"problem": "What is two?", "label": "math", "answer": "34"},
            "prompt=prompt  label=extra_info.opd_teacher  answer=reward_model.ground_truth",
        ),
        (
            {"question": "é ∑", "label": "a", "ground_truth": {"tests": [1]}},
            {"problem": "é ∑", "label": "a", "answer": {"tests": [1]}},
            "prompt=question  label=label  answer=ground_truth",
        ),
    ],
)
def test_formats_of_rows(run, tmp_path, row, prompt, keys):
    lines, report = run([row])
    assert lines == [prompt | {"id": f"{tmp_path}/in.jsonl:1"}]
    assert "  ".join(f"{name}={key}" for name, key in report.sources[0].keys.items()) == keys


def test_keys_are_chosen_for_each_file_and_may_be_named(run, tmp_path):
    other = tmp_path / "b.jsonl"
    other.write_text(json.dumps({"q": {"text": "Why?"}, "problem": "no", "kind": "code", "key": 7}) + "\n")
    keys = KeyChoice(prompt="q.text", label="kind", answer="key")
    out = tmp_path / "o.jsonl"
    make_prompt_file(PromptFileOptions(inputs=(str(other),), out=out, keys=keys))
    assert json.loads(out.read_text()) == {"problem": "Why?", "label": "code", "answer": 7, "id": f"{other}:1"}

    plain = tmp_path / "a.jsonl"
    plain.write_text(json.dumps(ROW) + "\n" + json.dumps({"messages": CHAT, "label": "math"}) + "\n")
    verl = tmp_path / "c.jsonl"
    verl.write_text(json.dumps(VERL | {"prompt": CHAT}))
    report = make_prompt_file(PromptFileOptions(inputs=(str(plain), str(verl)), out=out, overwrite=True))
    assert [s.keys["prompt"] for s in report.sources] == ["problem or messages", "prompt"]
    assert report.kept == 2 and _rejected(report) == {"duplicate": 1}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("in.json", json.dumps([ROW]).encode()),
        ("in.jsonl.gz", gzip.compress(mtime=0, data=json.dumps(ROW).encode())),
        ("in.jsonl", b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r\n\r\n"),
    ],
)
def test_formats_of_files(run, name, content):
    lines, report = run(content, name=name)
    assert lines[0]["problem"] == "What is two?" and report.rows == 1


def test_a_recipe_reads_the_output_as_it_is(run, tmp_path, chat_tokenizer):
    weights = {"math": 3, "code": 1}
    rows = [ROW, {"messages": CHAT, "label": "code"}, {"problem": "be brief", "label": weights}]
    lines, report = run(rows)
    assert lines[2]["label"] == weights
    source = SourceConfig(path=str(tmp_path / "out.jsonl"))
    config = DataConfig(train=(source,))
    prompts, read = read_prompts(config, config.train, chat_tokenizer, {"math", "code"})
    assert [p.label for p in prompts] == ["math", "code", "code+math"]
    assert prompts[2].mixture == (("code", 0.25), ("math", 0.75))
    assert read.by_label == {label: found.rows for label, found in report.labels.items()}


def test_prepared_rows_are_kept_when_prepared_again(run, tmp_path):
    rows = [ROW, ROW | {"problem": "Who?" + BOXED}, {"messages": CHAT, "label": {"math": 1, "code": 2}}]
    first, _ = run(rows)
    second, report = run((tmp_path / "out.jsonl").read_bytes(), name="again.jsonl")
    assert report.rejects == {} and len(second) == 3
    assert [line | {"id": 0} for line in first] == [line | {"id": 0} for line in second]


# ---- labels ---------------------------------------------------------------------------------------------------------


def test_one_label_for_all(run):
    lines, report = run([{"problem": "two"}, ROW | {"label": "other"}], label="code")
    assert [line["label"] for line in lines] == ["code", "code"] and set(report.labels) == {"code"}
    assert "label=code (all rows)" in str(report)


def test_labels_are_renamed_and_then_checked(run):
    rows = [{"problem": str(i), "label": label} for i, label in enumerate(["py", "sql", "math", "law", "code"])]
    lines, report = run(rows, label_map={"py": "code", "sql": "code", "code": "x"}, labels=frozenset({"math", "code"}))
    assert [line["label"] for line in lines] == ["code", "code", "math"]
    assert _rejected(report) == {"unknown label": 2}
    assert "label 'law' is not among code, math" in report.rejects["unknown label"].first


def test_weights_of_renamed_labels_add_up(run):
    rows = [
        {"problem": "a", "label": {"py": 1, "sql": 2, "math": 1, "law": None}},
        {"problem": "b", "label": {"py": 1, "sql": 0}},
        {"problem": "c", "label": {"math": 1, "law": 1}},
    ]
    lines, report = run(rows, label_map={"py": "code", "sql": "code"}, labels=frozenset({"math", "code"}))
    assert [line["label"] for line in lines] == [{"code": 3, "math": 1}, "code"]
    assert {label: found.rows for label, found in report.labels.items()} == {"code+math": 1, "code": 1}
    assert _rejected(report) == {"unknown label": 1}


def test_a_row_without_the_files_label_key_falls_back_on_nothing(run):
    bare = VERL | {"label": "code", "prompt": [{"role": "user", "content": "four"}], "extra_info": {"index": 1}}
    lines, report = run([VERL, bare])
    assert len(lines) == 1 and _rejected(report) == {"no label": 1}


# ---- rejects --------------------------------------------------------------------------------------------------------

WRONG = [
    (b"{oops", Reason.INVALID_JSON),
    (b"[1]", Reason.INVALID_JSON),
    (b'{"problem": "\xff"}', Reason.INVALID_JSON),
    ({"label": "math"}, Reason.NO_PROMPT),
    ({"problem": None, "label": "math"}, Reason.NO_PROMPT),
    (b'{"problem": NaN, "label": "math"}', Reason.NO_PROMPT),
    ({"problem": 3, "label": "math"}, Reason.NOT_TEXT),
    ({"problem": ["two"], "label": "math"}, Reason.NOT_TEXT),
    ({"messages": "hi", "label": "math", "problem": [{"role": "user", "content": 3}]}, Reason.NOT_TEXT),
    ({"problem": " \n", "label": "math"}, Reason.EMPTY),
    ({"problem": [], "label": "math"}, Reason.EMPTY),
    (b'{"problem": "two \\ud800", "label": "math"}', Reason.HALF_SURROGATE),
    (b'{"problem": "three", "label": "math", "answer": "\\ud800"}', Reason.HALF_SURROGATE),
    ({"problem": [*CHAT, {"role": "assistant", "content": "3"}], "label": "math"}, Reason.ENDS_WITH_ASSISTANT),
    ({"problem": "two"}, Reason.NO_LABEL),
    ({"problem": "two", "label": ""}, Reason.NO_LABEL),
    ({"problem": "two", "label": {}}, Reason.NO_LABEL),
    ({"problem": "two", "label": 3}, Reason.UNKNOWN_LABEL),
    ({"problem": "two", "label": {"math": -1}}, Reason.UNKNOWN_LABEL),
    ({"problem": "two", "label": {"math": 0}}, Reason.UNKNOWN_LABEL),
    ({"problem": "two", "label": "law"}, Reason.UNKNOWN_LABEL),
    (ROW | {"problem": " what is TWO? " + BOXED}, Reason.DUPLICATE),
    (ROW | {"label": "code"}, Reason.DUPLICATE_OTHER_LABEL),
    (ROW | {"problem": "one three plus two is three what is two plus"}, Reason.TOO_LONG),
]


def test_every_reason(run, tmp_path, make_hf_tokenizer):
    """All in one run, so that the counts, the examples and the file of rejects are those of a real one."""
    bench = tmp_path / "bench.jsonl"
    bench.write_text(json.dumps({"problem": "Is three plus two five?"}))
    wrong = [*WRONG, (ROW | {"problem": "is THREE plus two five?" + BOXED}, Reason.CONTAMINATED)]
    wrong.append((ROW | {"problem": CHAT[1:], "label": "code"}, None))
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row, _ in wrong]
    rejects = tmp_path / "rejects.jsonl"
    kept, report = run(
        b"\n".join([json.dumps(ROW).encode(), *lines]),
        labels=frozenset({"math", "code"}),
        benchmarks=(str(bench),),
        tokenizer=make_hf_tokenizer(tmp_path / "tokenizer"),
        max_prompt_tokens=10,
        rejects=rejects,
    )
    assert [line["problem"] for line in kept] == ["What is two?", "What is three?"]
    found = [json.loads(line) for line in rejects.read_text().splitlines()]
    expected = [reason for _, reason in wrong if reason]
    assert [(entry["where"], entry["reason"]) for entry in found] == [
        (f"{tmp_path}/in.jsonl:{number}", reason) for number, reason in enumerate(expected, 2)
    ]
    assert all(entry["detail"] for entry in found)
    assert found[3]["row"] == WRONG[3][0] and "row" not in found[0]
    assert _rejected(report) == {reason: expected.count(reason) for reason in Reason if reason in expected}
    assert set(expected) == set(Reason) - {Reason.TOKENIZER_REFUSES}
    assert report.rows == len(expected) + 2 == sum(_rejected(report).values()) + report.kept
    assert report.rejects["duplicate"].first == f"{tmp_path}/in.jsonl:23: the prompt of {tmp_path}/in.jsonl:1"
    assert report.other_labels == {"math / code": 1}
    assert "kept with label math" in report.rejects["duplicate with another label"].first
    assert report.length_unit == "tokens" and report.all_labels.lengths["p100"] == 9


def test_a_chat_that_the_tokenizer_cannot_take(run, tmp_path, make_hf_tokenizer):
    bare = make_hf_tokenizer(tmp_path / "tokenizer", template=None)
    lines, report = run([ROW, {"messages": CHAT, "label": "math"}], tokenizer=bare)
    assert len(lines) == 1 and _rejected(report) == {"tokenizer refuses": 1}


def test_a_rejected_row_makes_no_other_a_duplicate(run, tmp_path, make_hf_tokenizer):
    """The first is too long for its sake; the second says the same in fewer tokens."""
    rows = [ROW | {"problem": "two plus two" + BOXED}, ROW | {"problem": "two plus two"}]
    lines, report = run(rows, tokenizer=make_hf_tokenizer(tmp_path / "t"), max_prompt_tokens=8)
    assert [line["problem"] for line in lines] == ["two plus two"] and _rejected(report) == {"too long": 1}


def test_duplicates(run):
    asked = [{"role": "system", "content": BOXED}, {"role": "user", "content": "What is two?"}]
    other_system = [{"role": "system", "content": "You are a pirate."}, {"role": "user", "content": "What is two?"}]
    half = {"math": 1, "code": 1}
    rows = [
        ROW,
        {"messages": asked, "label": "math"},
        {"messages": other_system, "label": "math"},
        {"problem": "four", "label": half},
        {"problem": "Four", "label": {"code": 2, "math": 2}},
        {"problem": "four", "label": {"code": 3, "math": 1}},
    ]
    lines, report = run(rows)
    assert [line["id"].rsplit(":", 1)[1] for line in lines] == ["1", "3", "4"]
    assert _rejected(report) == {"duplicate": 2, "duplicate with another label": 1}
    assert report.other_labels == {"0.5 code+0.5 math / 0.75 code+0.25 math": 1}


def test_lengths(run):
    rows = [{"problem": "x" * 8 + chr(97 + i) * (i + 1), "label": "a" if i % 2 else "b"} for i in range(10)]
    _, report = run(rows)
    assert report.all_labels.lengths == {"p50": 14, "p90": 18, "p99": 18, "p100": 18}
    assert report.labels["a"].rows == 5 and report.labels["a"].lengths["p100"] == 18
    assert report.labels["b"].lengths["p100"] == 17 and report.length_unit == "characters"


def test_a_label_column_of_answers_is_no_label(run):
    rows = [{"problem": f"what is {i}", "label": str(i)} for i in range(3)]
    with pytest.raises(DataError, match=r"under 'label' looks like answers.*such as .0.\); give every row a"):
        run(rows)
    assert run(rows, label="math")[1].labels["math"].rows == 3
    assert len(run(rows, keys=KeyChoice(label="label"))[1].labels) == 3


def test_many_labels_are_summed_up_in_the_table(run):
    _, report = run([{"problem": str(i), "label": f"l{i:02d}"} for i in range(25)], keys=KeyChoice(label="label"))
    assert re.search(r"^\.\.\. 5 more +5", str(report), re.MULTILINE) and len(report.labels) == 25


_TEXTS = st.sampled_from(["", " ", "two", "Two ", "math", "code", "\ud800", "user", "assistant", BOXED])
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | _TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXTS | st.sampled_from(["role", "content"]), inner),
    max_leaves=6,
)
_CHATS = st.lists(st.fixed_dictionaries({"role": _TEXTS, "content": _TEXTS}), max_size=3)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries({}, optional={key: _JSON | _CHATS for key in ("problem", "messages", "label", "answer")})
    )
)
def test_every_row_is_kept_or_rejected_whatever_it_holds(run, tmp_path, chat_tokenizer, rows):
    """And what is kept is what training takes."""
    lines, report = run([ROW, *rows], keys=KeyChoice(label="label"))
    assert report.rows == 1 + len(rows) and len(lines) == report.kept
    assert report.kept + sum(_rejected(report).values()) == report.rows
    config = DataConfig(train=(SourceConfig(path=str(tmp_path / "out.jsonl")),))
    known = {
        label for line in lines for label in ([line["label"]] if isinstance(line["label"], str) else line["label"])
    }
    prompts, _ = read_prompts(config, config.train, chat_tokenizer, known)
    assert len(prompts) == report.kept
