"""Benchmarks in the course of training: when, what is reported and written, and what is refused."""

import json

import pytest
from boxed_models import box_words, write_benchmark
from tiny_run import make_inputs, read_metrics, tiny_recipe, write_recipe

from fire_megatron.cli.train import main

SAMPLES = 3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = make_inputs(tmp_path_factory.mktemp("benchmarks"), num_hidden_layers=1)
    for name in ("student", "math", "code"):
        box_words(folder / name)
    write_benchmark(folder / "sums.jsonl", 4)
    return folder


@pytest.fixture
def train(inputs, tmp_path):
    """Runs the recipe; ``changes`` are of its benchmark. Returns the exit code."""

    def run(steps=3, evaluation=None, **changes):
        benchmark = {"path": str(inputs / "sums.jsonl"), "samples": SAMPLES, "max_new_tokens": 10, **changes}
        recipe = tiny_recipe(inputs, tmp_path / "run", run__steps=steps, evaluation__benchmarks=[benchmark])
        recipe["evaluation"] |= evaluation or {}
        recipe["optimizer"] = {"lr": 0.02}
        return main(["--recipe", str(write_recipe(tmp_path / "recipe.yaml", recipe))])

    return run


def test_metrics_and_files_of_every_evaluation(train, tmp_path, capsys):
    assert train(evaluation={"every": 2}, batch_size=5) == 0
    folder = tmp_path / "run" / "evaluation"
    assert sorted(path.name for path in folder.iterdir()) == ["step_000000", "step_000002", "step_000003"]
    lines = {line["step"]: line for line in read_metrics(tmp_path / "run")}
    assert "eval/sums/avg@3" not in lines[1]
    averages = []
    for step in (0, 2, 3):
        place = folder / f"step_{step:06d}"
        assert sorted(path.name for path in place.iterdir()) == ["scores.json", "sums.jsonl"]
        rows = [json.loads(line) for line in (place / "sums.jsonl").read_text().splitlines()]
        assert [(r["problem"], r["sample"]) for r in rows] == [(p, s) for p in range(4) for s in range(SAMPLES)]
        averages.append(sum(r["correct"] for r in rows) / len(rows))
        scores = json.loads((place / "scores.json").read_text())["sums"]
        assert (scores.pop("problems"), scores.pop("samples")) == (4, SAMPLES)
        values = {name: score["value"] if isinstance(score, dict) else score for name, score in scores.items()}
        assert values["avg@3"] == pytest.approx(averages[-1]) and {"maj@3", "pass@2", "unanswered"} <= values.keys()
        assert {name: lines[step][f"eval/sums/{name}"] for name in values} == values
    assert 0 < averages[0] < 1
    before, after = (f"{100 * average:.1f}" for average in averages[::2])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("sums"))
    assert line.split()[:4] == ["sums", "avg@3", before, after], "the table at the end"


def logged(folder):
    """Every step of the log, and whether it was evaluated."""
    return [(line["step"], any(key.startswith("eval/") for key in line)) for line in read_metrics(folder / "run")]


def test_a_stop_gives_the_evaluation_up(train, tmp_path, monkeypatch):
    """Asked to stop by the first answer, the run leaves the rest of them and continues where it was."""
    from fire_megatron.evaluation import runner
    from fire_megatron.train.interrupt import StopRequest

    installed = []
    install = StopRequest.install
    monkeypatch.setattr(StopRequest, "install", lambda self: installed.append(self) or install(self))
    last_boxed = runner.last_boxed

    def stopping(text):
        installed[-1].signal_name = "SIGTERM"
        return last_boxed(text)

    monkeypatch.setattr(runner, "last_boxed", stopping)
    only_at_2 = {"every": 2, "at_start": False, "at_end": False}
    assert train(evaluation=only_at_2, batch_size=2) == 0
    assert logged(tmp_path) == [(1, False), (2, False)]
    assert not (tmp_path / "run" / "evaluation").exists()
    monkeypatch.setattr(runner, "last_boxed", last_boxed)
    assert train(evaluation=only_at_2, batch_size=2) == 0
    assert logged(tmp_path) == [(1, False), (2, True), (3, False)], "made up for"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "none.jsonl"}, "evaluation.benchmarks.0.path: none.jsonl does not exist"),
        ({"path": "~/none.jsonl"}, "evaluation.benchmarks.0.path: ~/none.jsonl: ~ is not replaced here"),
        ({"temperature": 0}, "evaluation.benchmarks.0.samples: 3, but at temperature 0"),
        ({"name": "a/b"}, "evaluation.benchmarks.0.name"),
        ({"name": "math"}, "evaluation.benchmarks.0.name: 'math' is a teacher's"),
        ({"max_new_tokens": 511}, "evaluation.benchmarks.0.max_new_tokens: 511: "),
    ],
)
def test_mistakes(train, changes, message, capsys):
    assert train(**changes) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown
