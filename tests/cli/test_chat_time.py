"""Chat templates that write today's date: it is the run's first day's, on every rank and whenever the run goes on."""

from __future__ import annotations

import json
import os
import shutil
from datetime import datetime

import pytest
import torch
from tiny_run import read_metrics, tiny_recipe, write_recipe

from fire_megatron.cli import evaluate
from fire_megatron.cli.train import main
from fire_megatron.data.chat_time import chat_time
from fire_megatron.data.tokenizer import load_tokenizer
from fire_megatron.evaluation import generations
from fire_megatron.train import checkpoints, inputs

TEMPLATE = (
    "{% macro today() %}{{ strftime_now('w%-d w%-m') }}{% endmacro %}"
    "{{ today() }} {% for m in messages %}{{ m['content'] }} {% endfor %}"
)


@pytest.fixture
def models(tiny, tmp_path):
    """The tiny models, with a template that writes the date."""
    folder = tmp_path / "models"
    for name in ("student", "math", "code"):
        shutil.copytree(tiny / name, folder / name)
        (folder / name / "chat_template.jinja").write_text(TEMPLATE)
    for name in ("math", "code"):
        shutil.copy(tiny / f"{name}.jsonl", folder)
    return folder


@pytest.fixture
def on_day(monkeypatch):
    """``on_day(n)``: it is a day in March, for everything that asks."""
    from transformers.utils import chat_template_utils

    def set_day(number):
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime(2026, 3, number, 23, 59)

        for module in (checkpoints, inputs, generations, chat_template_utils):
            monkeypatch.setattr(module, "datetime", Clock)

    return set_day


def test_a_template_is_told_the_time(models):
    tokenizer = load_tokenizer(models / "student")
    chat = [{"role": "user", "content": "w9"}]
    now = datetime.now()
    with chat_time(datetime(2020, 12, 31)):
        assert tokenizer.apply_chat_template(chat) == [31, 12, 9]
    assert tokenizer.apply_chat_template(chat)[:2] in ([t.day, t.month] for t in (now, datetime.now()))


def test_a_run_that_goes_on_another_day(models, tmp_path, on_day, monkeypatch):
    asked = []
    order = checkpoints.fingerprint
    monkeypatch.setattr(checkpoints, "fingerprint", lambda prompts: asked.append(prompts) or order(prompts))
    recipe = str(write_recipe(tmp_path / "recipe.yaml", tiny_recipe(models, tmp_path / "run")))
    for day, steps in ((6, 1), (7, 2), (8, 3)):
        on_day(day)
        assert main(["--recipe", recipe, f"run.steps={steps}"]) == 0
    assert {prompt.token_ids[:2] for prompts in asked for prompt in prompts} == {(6, 3)}
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3]


def test_a_run_of_an_earlier_version_goes_on_another_day(models, tmp_path, on_day):
    """It kept no date: its first recipe was written on its first day."""
    recipe = str(write_recipe(tmp_path / "recipe.yaml", tiny_recipe(models, tmp_path / "run", run__steps=1)))
    on_day(6)
    assert main(["--recipe", recipe]) == 0
    [path] = (tmp_path / "run").glob("checkpoints/step_*/weights/common.pt")
    common = torch.load(path)
    assert common["extra"].pop("begun") == "2026-03-06T23:59:00"
    torch.save(common, path)
    path.with_name("checksums.json").unlink()
    written = datetime(2026, 3, 6, 12).timestamp()
    os.utime(tmp_path / "run" / "recipe.yaml", (written, written))
    on_day(7)
    assert main(["--recipe", recipe, "run.steps=2"]) == 0


def test_an_evaluation_that_goes_on_another_day(models, tmp_path, on_day):
    (tmp_path / "bench.jsonl").write_text('{"problem": "w7", "answer": "1"}\n{"problem": "w8", "answer": "2"}\n')
    words = ["--checkpoint", str(models / "student"), "--benchmark", str(tmp_path / "bench.jsonl")]
    words += ["--out", str(tmp_path / "out"), "--max-new-tokens", "4"]
    answers = []
    for day in (6, 7):
        on_day(day)
        assert evaluate.main(words) == 0
        answers.append((tmp_path / "out" / "bench.jsonl").read_text())
        (tmp_path / "out" / "bench.jsonl").write_text("")  # to be answered once more
    assert answers[0] == answers[1]
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["begun"] == "2026-03-06T23:59:00"
    assert evaluate.main([*words[:-4], "--out", str(tmp_path / "other"), "--max-new-tokens", "4"]) == 0
    assert (tmp_path / "other" / "bench.jsonl").read_text() != answers[0], "the date makes a difference"
