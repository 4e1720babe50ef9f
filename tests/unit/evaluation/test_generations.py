"""Files of answers: cut short, continued by other ranks, merged, and refused with other settings."""

import json
import os

import pytest

from fire_megatron.config.errors import DataError
from fire_megatron.evaluation.generations import (
    Generation,
    PartFiles,
    only_writer,
    read_generations,
    require_settings,
    write_answers,
)

SETTINGS = {"temperature": 1.0, "max_new_tokens": 16, "seed": 7}


def generation(problem, sample, text="so \\boxed{2}"):
    return Generation(problem, sample, 7, text, "2", "2", True, True, 5, False)


def write(folder, rank, *generations):
    with PartFiles(folder, rank) as parts:
        for one in generations:
            parts.add("amc", one)


def merge(folder):
    write_answers(folder, "--out", "amc", PartFiles(folder, 0).held("amc"))


def test_parts_of_all_ranks_are_read_and_merged_in_order(tmp_path):
    write(tmp_path, 1, generation(1, 0), generation(0, 1))
    write(tmp_path, 0, generation(0, 0, "\0 \ud800 \u2028 é"))
    assert sorted(read_generations(tmp_path, "amc")) == [(0, 0), (0, 1), (1, 0)]
    merge(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "amc.jsonl").read_bytes().splitlines()]
    assert [(line["problem"], line["sample"]) for line in lines] == [(0, 0), (0, 1), (1, 0)]
    assert lines[0]["text"] == "\0 ? \u2028 é"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["amc.jsonl"]
    write(tmp_path, 2, generation(2, 0))  # more samples later
    assert len(read_generations(tmp_path, "amc")) == 4


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_line_that_was_cut_short_is_dropped(tmp_path, cut):
    write(tmp_path, 0, generation(0, 0), generation(0, 1))
    path = tmp_path / "parts" / "amc" / "00000.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert list(read_generations(tmp_path, "amc")) == [(0, 0)]
    write(tmp_path, 0, generation(0, 1), generation(1, 0))
    assert len(path.read_bytes().splitlines()) == 3
    assert list(read_generations(tmp_path, "amc")) == [(0, 0), (0, 1), (1, 0)]


def test_killed_between_merging_and_removing_parts(tmp_path):
    write(tmp_path, 0, generation(0, 0, "first"))
    merge(tmp_path)
    write(tmp_path, 0, generation(0, 0, "again"))
    merge(tmp_path)
    assert [g.text for g in read_generations(tmp_path, "amc").values()] == ["first"]


def require(folder, *, model="a", fingerprint="f", benchmarks=None, **changes):
    require_settings(folder, model, fingerprint, {**SETTINGS, **changes}, benchmarks or {"amc": "1"})


def test_settings_are_those_that_the_answers_were_made_with(tmp_path):
    require(tmp_path)
    require(tmp_path, model="moved")
    require(tmp_path, benchmarks={"aime": "2"})
    assert json.loads((tmp_path / "settings.json").read_text())["benchmarks"] == {"amc": "1", "aime": "2"}
    with pytest.raises(DataError, match=r"--max-new-tokens: .* made with 16, not 32"):
        require(tmp_path, max_new_tokens=32)
    with pytest.raises(DataError, match="--checkpoint or --hf: .* answers of a, and b has other weights"):
        require(tmp_path, model="b", fingerprint="g")
    with pytest.raises(DataError, match="--benchmark aime: .* another file"):
        require(tmp_path, benchmarks={"aime": "3"})


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": 1}'])
def test_settings_that_are_none(tmp_path, text):
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(DataError, match=r"settings\.json: cannot be read"):
        require(tmp_path)


def test_one_evaluation_at_a_time(tmp_path):
    busy = pytest.raises(DataError, match=rf"--out {tmp_path}/out: process {os.getpid()} on \S+ writes there")
    with only_writer(tmp_path / "out"), busy, only_writer(tmp_path / "out"):
        pass
    with only_writer(tmp_path / "out"):
        pass
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(DataError, match="--out"):
        require(tmp_path / "out")
    with pytest.raises(DataError, match="--out"):
        write(tmp_path / "out", 0, generation(0, 0))
