"""Parquet as verl and pandas write it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fire_megatron.config.errors import DataError
from fire_megatron.data.parquet import read_parquet
from fire_megatron.prepare.prompt_file import PromptFileOptions, make_prompt_file
from fire_megatron.prepare.row_keys import KeyChoice
from fire_megatron.prepare.tally import PrepareReport

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def _verl(index: int, text: str, teacher: Any = "math") -> dict[str, Any]:
    return {
        "data_source": "set",
        "prompt": [{"role": "user", "content": text}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(index)},
        "extra_info": {"index": index, "split": "train", "opd_teacher": teacher},
    }


def _prepare(path: Path, **options: Any) -> tuple[list[dict[str, Any]], PrepareReport]:
    out = path.with_name("out.jsonl")
    report = make_prompt_file(PromptFileOptions(inputs=(str(path),), out=out, overwrite=True, **options))
    return [json.loads(line) for line in out.read_text().splitlines()], report


def test_rows_of_verl_over_several_batches_and_row_groups(tmp_path):
    path = tmp_path / "train.parquet"
    rows = [_verl(i, f"What is {i}?", ("math", "code")[i % 2]) for i in range(2500)]
    rows += [_verl(0, "What is  7?", "math"), _verl(0, "no teacher", None)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=700)
    lines, report = _prepare(path)
    assert lines[1234] == {"problem": "What is 1234?", "label": "math", "answer": "1234", "id": f"{path}:1235"}
    assert len(lines) == 2500 and {label: r.rows for label, r in report.labels.items()} == {"code": 1250, "math": 1250}
    assert report.rejects["duplicate with another label"].first.startswith(f"{path}:2501: the prompt of {path}:8, ")
    assert report.rejects["no label"].first.startswith(f"{path}:2502: ")


def test_columns_as_pandas_and_datasets_store_them(tmp_path):
    """Maps and structs of weights, categories, large strings, numbers; missing values as null and NaN."""
    path = tmp_path / "a.pq"
    weights = pa.array([[("math", 1.0), ("code", 3.0)], [("code", 1.0)], None], pa.map_(pa.string(), pa.float64()))
    table = {
        "problem": pa.array(["one", "two", "three"], pa.large_string()).dictionary_encode(),
        "label": weights,
        "answer": pa.array([1.0, float("nan"), None]),
        "image": pa.array([b"\xff" * 9] * 3),
    }
    pq.write_table(pa.table(table), path)
    lines, report = _prepare(path)
    assert [(line["label"], line.get("answer")) for line in lines] == [({"math": 1, "code": 3}, 1.0), ("code", None)]
    assert report.rejects["no label"].rows == 1

    weights = pa.array([{"math": 1, "code": None}, {"math": 1, "code": 2}])
    pq.write_table(pa.table({"problem": ["one", "two"], "label": weights}), path)
    assert [line["label"] for line in _prepare(path)[0]] == ["math", {"math": 1, "code": 2}]


def test_only_the_columns_of_the_keys_are_read(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["a"], "x.y": ["math"], "image": [b"big"], "extra": [{"k": 1}]}), path)
    assert [row for _, row in read_parquet(path, {"prompt", "x.y", "extra", "absent"})] == [
        {"prompt": "a", "x.y": "math", "extra": {"k": 1}}
    ]
    assert _prepare(path, keys=KeyChoice(label="x.y"))[0][0]["label"] == "math"


def test_a_text_that_is_not_utf8_costs_its_row_alone(tmp_path):
    path = tmp_path / "a.parquet"
    texts = pa.array([b"one", b"\xff\xfe", b"three"]).view(pa.string())
    pq.write_table(pa.table({"problem": texts}), path)
    lines, report = _prepare(path, label="math")
    assert [line["id"] for line in lines] == [f"{path}:1", f"{path}:3"]
    assert report.rejects["invalid JSON"].first.startswith(f"{path}:2: a text is not UTF-8")


def test_a_benchmark_in_parquet(tmp_path):
    path, bench = tmp_path / "a.parquet", tmp_path / "b.parquet"
    pq.write_table(pa.table({"problem": ["Who is he?", "Who am I?"]}), path)
    pq.write_table(pa.table({"question": ["who  IS he?"]}), bench)
    lines, report = _prepare(path, label="math", benchmarks=(str(bench),))
    assert [line["problem"] for line in lines] == ["Who am I?"]
    assert report.rejects["contaminated"].first == f"{path}:1: all of the problem at {bench}:1"
    assert (report.benchmarks[0].problems, report.benchmarks[0].rows_in_full) == (1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"keys": KeyChoice(label="extra_info.teacher")},
            "--label-key extra_info.teacher: none .* columns are data_source",
        ),
        ({"keys": KeyChoice(prompt="text")}, "--prompt-key text: none of the first 1 rows has it; the columns are"),
    ],
)
def test_a_column_that_is_not_there(tmp_path, options, message):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([_verl(0, "one")]), path)
    with pytest.raises(DataError, match=message):
        _prepare(path, **options)


def test_no_column_that_could_be_meant(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"], "kind": ["math"]}), path)
    with pytest.raises(DataError, match="no prompt under any of problem, .* the columns are text, kind"):
        _prepare(path)


def test_files_that_are_no_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([_verl(i, str(i) * 50) for i in range(500)]), path)
    for content in (b'{"problem": "two"}', b"", path.read_bytes()[:-100]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.parquet: cannot be read as Parquet"):
            _prepare(path)


def test_without_pyarrow(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"problem": ["a"]}), path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"reading Parquet needs pyarrow.*pip install pyarrow"):
        _prepare(path)
