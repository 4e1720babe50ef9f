"""Files that are made of prompts: whole, or as they were; and mistakes in what is asked for."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fire_megatron.config.errors import DataError
from fire_megatron.prepare.prompt_file import NoRowsLeft, PromptFileOptions, make_prompt_file
from fire_megatron.prepare.row_keys import KeyChoice

ROW = {"problem": "What is two?", "label": "math", "answer": "2"}


def test_nothing_is_replaced_unless_told_to_and_nothing_left_behind(tmp_path):
    source, out, report = (tmp_path / name for name in ("in.jsonl", "sub/out.jsonl", "report.json"))
    source.write_text(json.dumps(ROW))
    options = {"inputs": (str(source),), "out": out, "report": report}
    make_prompt_file(PromptFileOptions(**options))
    assert json.loads(report.read_text())["kept"] == 1
    before = out.read_bytes()
    source.write_text(json.dumps(ROW | {"problem": "three"}))
    with pytest.raises(DataError, match=r"out\.jsonl: is there already; .*--overwrite"):
        make_prompt_file(PromptFileOptions(**options))
    assert out.read_bytes() == before
    make_prompt_file(PromptFileOptions(**options, overwrite=True))
    assert out.read_bytes() != before
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in.jsonl", "out.jsonl", "report.json", "sub"]


def test_a_failure_leaves_what_was_there(tmp_path):
    source, out = tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl"
    source.write_bytes(
        gzip.compress(
            mtime=0, data="".join(json.dumps({"problem": str(i), "label": "a"}) + "\n" for i in range(9999)).encode()
        )[:-20]
    )
    out.write_text("mine")
    with pytest.raises(DataError, match="in.jsonl.gz: cannot be read"):
        make_prompt_file(PromptFileOptions(inputs=(str(source),), out=out, overwrite=True))
    assert out.read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_is_told(tmp_path):
    """A limit on the size of files stands for the disk."""
    import resource

    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"problem": f"{i} " * 2000, "label": "a"}) + "\n" for i in range(400)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(DataError, match=r"cannot write \(File too large\)"):
            make_prompt_file(PromptFileOptions(inputs=(str(source),), out=out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_no_row_left_writes_only_what_tells_why(tmp_path):
    source, rejects = tmp_path / "in.jsonl", tmp_path / "rejects.jsonl"
    source.write_text(json.dumps({"problem": "", "label": "a"}))
    with pytest.raises(
        NoRowsLeft, match="no row left of .*: all 1 are rejected, see the report; .* is not written"
    ) as error:
        make_prompt_file(PromptFileOptions(inputs=(str(source),), out=tmp_path / "out.jsonl", rejects=rejects))
    assert error.value.report.rejects["empty"].rows == 1
    assert rejects.exists() and not (tmp_path / "out.jsonl").exists()
    source.write_text("")
    with pytest.raises(NoRowsLeft, match="there is none"):
        make_prompt_file(PromptFileOptions(inputs=(str(source),), out=tmp_path / "out.jsonl"))


def test_patterns(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}[1].jsonl").write_text(json.dumps(ROW | {"problem": name}))
    out = tmp_path / "out.txt.jsonl"
    inputs = (f"{tmp_path}/b[[]1].jsonl", f"{tmp_path}/*].jsonl", f"{tmp_path}/a[1].jsonl")
    report = make_prompt_file(PromptFileOptions(inputs=inputs, out=out))
    assert [Path(s.path).name for s in report.sources] == ["b[1].jsonl", "a[1].jsonl"], "each once"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": ("{d}/absent.jsonl",)}, "absent.jsonl: no such file"),
        ({"inputs": ("{d}/x*.parquet",)}, r"x\*.parquet: no such file"),
        ({"inputs": ("{d}",)}, r"is a folder; name the files, such as '.*/\*.parquet'"),
        ({"benchmarks": ("{d}/absent.jsonl",)}, "absent.jsonl: no such file"),
        ({"out": "{d}/out.json"}, r"--out .*out.json: a recipe reads JSON Lines .*\.jsonl"),
        ({"out": "{d}/in.jsonl"}, r"in.jsonl: is also read from"),
        ({"out": "{d}/link.jsonl", "overwrite": True}, r"link.jsonl: is also read from"),
        ({"out": "{d}/folder.jsonl"}, "is a folder"),
        ({"out": "{d}/in.jsonl/out.jsonl"}, "cannot be written"),
        ({"rejects": "{d}/out.jsonl"}, "is named for two outputs"),
        ({"report": "{d}/in.jsonl", "overwrite": True}, "is also read from"),
        ({"rejects": "{d}/bench.jsonl", "benchmarks": ("{d}/bench.jsonl",), "overwrite": True}, "is also read from"),
        ({"keys": KeyChoice(prompt="text")}, r"--prompt-key text: none of the first 2 rows .* keys are problem, label"),
        ({"keys": KeyChoice(messages="chat")}, "--messages-key chat: none"),
        ({"keys": KeyChoice(label="extra_info.teacher")}, "--label-key extra_info.teacher: none"),
        ({"keys": KeyChoice(answer="solution")}, "--answer-key solution: none"),
        ({"inputs": ("{d}/bare.jsonl",)}, r"bare.jsonl: no label under any of extra_info.opd_teacher.*--label"),
        ({"inputs": ("{d}/odd.jsonl",)}, r"odd.jsonl: no prompt under any of problem.*keys are text, label"),
        ({"max_prompt_tokens": 3}, "--max-prompt-tokens needs --tokenizer"),
        ({"tokenizer": "{d}/absent"}, "absent: no such folder"),
        ({"overlap": 0.0}, "--overlap 0.0: give a share above 0"),
        ({"overlap": 1.5}, "--overlap 1.5"),
        ({"label": "a", "label_map": {"a": "b"}}, "leave out --label-key and --map"),
        ({"label": "a", "labels": frozenset({"b"})}, "--label a is not among --labels b"),
    ],
)
def test_mistakes(tmp_path, options, message):
    (tmp_path / "in.jsonl").write_text(f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n")
    (tmp_path / "bench.jsonl").write_text(json.dumps(ROW))
    (tmp_path / "bare.jsonl").write_text('{"problem": "two"}')
    (tmp_path / "odd.jsonl").write_text('{"text": "two", "label": "a"}')
    (tmp_path / "link.jsonl").symlink_to("in.jsonl")
    (tmp_path / "folder.jsonl").mkdir()

    def placed(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(text.format(d=tmp_path) for text in value)
        return Path(value.format(d=tmp_path)) if isinstance(value, str) and value.startswith("{d}") else value

    before = sorted(tmp_path.rglob("*"))
    values = {"inputs": ("{d}/in.jsonl",), "out": "{d}/out.jsonl"} | options
    with pytest.raises(DataError, match=message):
        make_prompt_file(PromptFileOptions(**{name: placed(value) for name, value in values.items()}))
    assert sorted(tmp_path.rglob("*")) == before
