"""The evaluation command on one rank: scores, resuming after stops and kills, and what it refuses."""

import json
import os
import shutil
import signal

import pytest
from boxed_models import make_model, write_benchmark

from fire_megatron.cli.evaluate import main
from fire_megatron.evaluation import runner
from fire_megatron.evaluation.generations import PartFiles

PROBLEMS, SAMPLES = 6, 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    make_model(folder / "model")
    write_benchmark(folder / "sums.jsonl", PROBLEMS)
    write_benchmark(folder / "more.jsonl", 3)
    return folder


@pytest.fixture
def evaluate(inputs, tmp_path):
    """Runs the command on the model; returns its exit code."""

    def run(*options, model="--checkpoint", out=tmp_path / "out", benchmarks=("sums",), samples=SAMPLES):
        folder = inputs / ("model" if model == "--checkpoint" else "model-hf")
        files = [str(inputs / f"{name}.jsonl") for name in benchmarks]
        fixed = ["--max-new-tokens", "12", "--batch-size", "8", "--device", "cpu", "--samples", str(samples)]
        return main([model, str(folder), "--benchmark", *files, "--out", str(out), *fixed, *map(str, options)])

    return run


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """A run that was never stopped."""
    out = tmp_path_factory.mktemp("whole")
    assert main(
        f"--checkpoint {inputs}/model --benchmark {inputs}/sums.jsonl --out {out} --max-new-tokens 12 --batch-size 8 "
        f"--device cpu --samples {SAMPLES}".split()
    ) == 0  # fmt: skip
    return out


@pytest.fixture
def written(monkeypatch):
    """(problem, sample) of every answer that is written, in order."""
    keys = []
    add = PartFiles.add

    def recording(self, name, generation):
        add(self, name, generation)
        keys.append(generation.key)

    monkeypatch.setattr(PartFiles, "add", recording)
    return keys


def lines(out, name="sums"):
    return (out / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()


def test_scores_are_those_of_what_was_written(whole):
    rows = [json.loads(line) for line in lines(whole)]
    assert [(r["problem"], r["sample"]) for r in rows] == [(p, s) for p in range(PROBLEMS) for s in range(SAMPLES)]
    for row in rows:
        value = row["text"].rpartition("{")[2].partition("}")[0] or None
        assert row["answer"] == value and row["correct"] == (value is not None and float(value) == float(row["right"]))
        assert row["truncated"] == (row["tokens"] == 12) or row["tokens"] == 12
    scores = json.loads((whole / "scores.json").read_text())["benchmarks"]["sums"]
    right = [sum(r["correct"] for r in rows[p * SAMPLES : (p + 1) * SAMPLES]) for p in range(PROBLEMS)]
    assert 0 < sum(right) < PROBLEMS * SAMPLES, "a test of nothing"
    assert scores["avg@4"]["value"] == pytest.approx(sum(right) / PROBLEMS / SAMPLES)
    assert scores["pass@4"]["value"] == pytest.approx(sum(c > 0 for c in right) / PROBLEMS)
    votes = 0.0
    for problem in range(PROBLEMS):
        said = [float(r["answer"]) for r in rows[problem * SAMPLES : (problem + 1) * SAMPLES] if r["answer"]]
        winners = {v for v in said if said.count(v) == max(map(said.count, said))}
        votes += (problem % 4 in winners) / len(winners) if winners else 0.0
    assert scores["maj@4"]["value"] == pytest.approx(votes / PROBLEMS)
    agreed = sum(r["correct"] == r["math_verify"] for r in rows)
    assert scores["agrees_with_math_verify"] == pytest.approx(agreed / len(rows))
    assert scores["mean_length"] == pytest.approx(sum(r["tokens"] for r in rows) / len(rows))
    assert sorted(path.name for path in whole.iterdir()) == ["scores.json", "settings.json", "sums.jsonl"]


def test_a_stopped_run_continues(evaluate, whole, tmp_path, written, monkeypatch, capsys):
    last_boxed, looked_at = runner.last_boxed, []

    def stopping(text):
        looked_at.append(text)
        if len(looked_at) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return last_boxed(text)

    monkeypatch.setattr(runner, "last_boxed", stopping)
    assert evaluate() == 0
    shown = capsys.readouterr().out
    assert f"stopped with {PROBLEMS * SAMPLES - len(written)} answers to go; run again to continue" in shown
    assert 1 <= len(written) < PROBLEMS * SAMPLES and not (tmp_path / "out" / "scores.json").exists()
    assert evaluate("--batch-size", 3) == 0
    assert len(written) == len(set(written)) == PROBLEMS * SAMPLES, "nothing is sampled twice"
    assert lines(tmp_path / "out") == lines(whole)
    assert (tmp_path / "out" / "scores.json").read_text() == (whole / "scores.json").read_text()


def test_a_killed_run_of_several_ranks_continues(evaluate, whole, tmp_path, written):
    """Parts of three ranks, the last line of one cut short."""
    out, made = tmp_path / "out", lines(whole)
    (out / "parts" / "sums").mkdir(parents=True)
    shutil.copy(whole / "settings.json", out)
    for rank, part in enumerate((made[:3], made[5:9], made[12:14])):
        text = "".join(f"{line}\n" for line in part)
        (out / "parts" / "sums" / f"{rank:05d}.jsonl").write_text(text if rank else text[:-9])
    assert evaluate() == 0
    assert len(written) == PROBLEMS * SAMPLES - 8
    assert lines(out) == made
    assert (out / "scores.json").read_text() == (whole / "scores.json").read_text()


def test_a_finished_run_grows(evaluate, whole, tmp_path, written, capsys):
    """More problems, more samples and more benchmarks leave what is there; scores count what is asked for."""
    out = tmp_path / "out"
    assert evaluate("--limit", 2, samples=2) == 0
    assert evaluate() == 0
    assert evaluate(benchmarks=("sums", "more")) == 0
    assert len(written) == PROBLEMS * SAMPLES + 3 * SAMPLES
    assert lines(out) == lines(whole)
    assert "more" in capsys.readouterr().out
    shutil.rmtree(out / "parts", ignore_errors=True)
    assert evaluate("--limit", 2, samples=2) == 0  # needs no model
    scores = json.loads((out / "scores.json").read_text())["benchmarks"]["sums"]
    assert (scores["problems"], scores["samples"]) == (2, 2)


def test_a_hugging_face_folder(evaluate, whole, tmp_path, inputs):
    out = tmp_path / "out"
    assert evaluate(model="--hf") == 0
    assert lines(out) == lines(whole)
    assert sorted(path.name for path in out.iterdir()) == ["scores.json", "settings.json", "sums.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", 0], "--samples: 0 is not allowed; it must be at least 1 and below 65536"),
        (["--temperature", 0], "--samples: 4, but at temperature 0 they are all the same"),
        (["--temperature", -1], "--temperature: -1.0 is not allowed; it must be at least 0"),
        (["--top-p", "nan"], "--top-p: nan"),
        (["--tensor", 0], "--tensor: 0 is not allowed; it must be at least 1"),
        (["--timeout", 0], "--timeout: 0.0 is not allowed; it must be above 0"),
        (["--max-new-tokens", 510], "sums.jsonl:1: 3 tokens, and the model's positions leave 2"),
        (["--tensor", 2], "--tensor and --pipeline: tensor 2 x pipeline 1 x context 1 = 2 ranks a copy of the model"),
        (["--tensor", 3], "--tensor: 3 does not divide the model's 4 heads nor its 2 key/value heads"),
        (["--chat-template", "on"], "--chat-template: on, but the tokenizer has no chat template"),
        (["--system-prompt", "be right"], "--system-prompt: needs a chat template"),
        (["--chat-template-kwargs", '{"a": 1}'], "--chat-template-kwargs.a: prompts go through no chat template"),
        (["--answer-key", "key"], "sums.jsonl:1: 'key' is None; write the right answer there"),
        (["--benchmark", "none.jsonl"], "--benchmark none.jsonl: none.jsonl does not exist"),
        (["--out", "/proc/nowhere"], "--out /proc/nowhere: cannot be written"),
    ],
)
def test_mistakes(evaluate, options, message, capsys):
    assert evaluate(*options) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown


def test_mistakes_in_the_model_and_in_what_is_there(evaluate, whole, inputs, tmp_path, capsys):
    def refused(message, *arguments):
        assert main([*map(str, arguments), "--benchmark", f"{inputs}/sums.jsonl", "--device", "cpu"]) == 2
        shown = capsys.readouterr().err
        assert message in shown and "Traceback" not in shown, shown

    refused("none does not exist", "--checkpoint", tmp_path / "none")
    refused("none does not exist", "--hf", tmp_path / "none")
    refused("is a Hugging Face folder and must be converted first", "--checkpoint", f"{inputs}/model-hf")
    fixed = ["--max-new-tokens", 12]
    refused("--seed: ", "--checkpoint", f"{inputs}/model", "--out", whole, *fixed, "--seed", 8)
    refused("has other weights or another tokenizer", "--hf", f"{inputs}/model-hf", "--out", whole, *fixed)
    for text in ("{", "[1]"):
        with pytest.raises(SystemExit, match="2"):
            main(["--checkpoint", "a", "--benchmark", "c", "--chat-template-kwargs", text])
    with pytest.raises(SystemExit, match="2"):
        main(["--checkpoint", "a", "--hf", "b", "--benchmark", "c"])
