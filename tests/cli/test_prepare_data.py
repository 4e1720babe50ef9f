"""The tool as a user starts it: what it prints, where, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "prepare_data.py"


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments], cwd=folder, capture_output=True, text=True, timeout=120,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )  # fmt: skip


def test_prepare_data(tmp_path):
    rows = [{"problem": f"What is {i} plus {i}?", "label": "maths"} for i in range(5)]
    rows += [rows[0], {"problem": "", "label": "maths"}, {"problem": "Why?", "label": "law"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "bench.jsonl").write_text(json.dumps({"problem": "What is 4 plus 4?"}))
    arguments = ("in.jsonl", "--out", "out.jsonl", "--map", "maths=math", "--labels", "math,code", "--report", "r.json")

    done = _run(tmp_path, *arguments, "--rejects", "rejects.jsonl", "--benchmark", "bench.jsonl")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("8 rows read, 4 kept, 4 rejected\n")
    for line in (
        "in.jsonl     8     4  prompt=problem  label=label",
        "math      4               17   17   17    17",
        "duplicate         1  in.jsonl:6: the prompt of in.jsonl:1",
        "unknown label     1  in.jsonl:8: label 'law' is not among code, math",
        "contaminated      1  in.jsonl:5: all of the problem at bench.jsonl:1",
        "bench.jsonl         1      1             1        1",
        "wrote out.jsonl (",
    ):
        assert line in done.stdout, done.stdout
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert lines[3] == {"problem": "What is 3 plus 3?", "label": "math", "id": "in.jsonl:4"}
    assert json.loads((tmp_path / "r.json").read_text())["rejects"]["empty"]["rows"] == 1
    assert len((tmp_path / "rejects.jsonl").read_text().splitlines()) == 4

    again = _run(tmp_path, *arguments)
    assert again.returncode == 2 and "Traceback" not in again.stderr
    assert again.stderr.startswith("error: out.jsonl: is there already")

    none = _run(tmp_path, "in.jsonl", "--out", "none.jsonl", "--labels", "code")
    assert none.returncode == 2 and "unknown label     7" in none.stdout
    assert "error: no row left of in.jsonl" in none.stderr and not (tmp_path / "none.jsonl").exists()
