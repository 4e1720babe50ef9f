"""``fire-megatron report``: a real run's page in a real browser without a network."""

from __future__ import annotations

import json
import random
import time

import pytest
from browser import Browser
from processes import call
from report_page import blocks
from tiny_run import make_inputs, read_metrics, tiny_recipe, write_recipe

from fire_megatron.cli import train
from fire_megatron.cli.main import main

ATTACK = "</script><script>document.title='hit'</script><img src=x onerror=\"document.title='hit'\"><b>&amp;"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of three steps whose prompts, and one answer, would be markup."""
    folder = tmp_path_factory.mktemp("report")
    inputs = make_inputs(folder, num_hidden_layers=1)
    for path in (inputs / "math.jsonl", inputs / "code.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**row, "problem": f"{row['problem']} {ATTACK}"}) + "\n" for row in rows))
    run = folder / "run"
    held_out = {"prompts": [{"path": str(inputs / "math.jsonl")}], "num_prompts": 2, "max_new_tokens": 4}
    values = tiny_recipe(
        inputs, run, metrics__samples=6, run__steps=3, rollout__prompts_per_step=8, evaluation=held_out,
        checkpoint__final=False,
    )  # fmt: skip
    assert train.main(["--recipe", str(write_recipe(folder / "recipe.yaml", values))]) == 0
    samples = run / "samples.jsonl"
    last = json.loads(samples.read_text().splitlines()[-1])
    last |= {"row": 99, "teacher": "math", "response": ATTACK, "by_token": {"text": [ATTACK[:9], ATTACK[9:]]}}
    with samples.open("a") as stream:
        stream.write(json.dumps(last) + "\n")
    return run


@pytest.fixture(scope="module")
def page(run_dir):
    assert main(["report", str(run_dir)]) == 0
    return run_dir / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    window = Browser(tmp_path_factory.mktemp("profile"))
    yield window
    window.close()


@pytest.fixture
def opened(browser, page):
    """The page in the browser, in light colours; errors on its console or requests fail the test."""
    browser.scheme("light")
    browser.open(page)
    yield browser
    assert browser.console() == []
    assert browser.requests() == [page.as_uri()], "the page asks for nothing but itself"


CURVES = "document.querySelectorAll('.scatterlayer .trace, .barlayer .trace').length"


def draw_all(browser):
    """Scroll through the page until every chart is drawn; their curves, bars included."""
    browser.run("document.querySelectorAll('.plot').forEach((plot) => plot.scrollIntoView())")
    for place in range(browser.run("return document.querySelectorAll('.plot').length")):
        browser.run("document.querySelectorAll('.plot')[arguments[0]].scrollIntoView()", place)
        browser.until(
            "return document.querySelectorAll('.plot')[arguments[0]].querySelector('.main-svg') !== null", place
        )
    return browser.run(f"return {CURVES}")


def cards(browser):
    """Text, kind and token backgrounds of the trajectories in the list, unpacked."""
    browser.until(
        "for (const card of document.querySelectorAll('.trajectory')) card.scrollIntoView();"
        "return [...document.querySelectorAll('.trajectory')].every((card) => card.querySelector('.response'))"
    )
    return browser.run(
        "return [...document.querySelectorAll('.trajectory')].map((card) => ({"
        "  facts: card.querySelector('.facts').textContent, kind: card.className,"
        "  prompt: card.querySelector('.prompt').textContent, response: card.querySelector('.response').textContent,"
        "  shades: [...card.querySelectorAll('.response span')].map((token) => token.style.background)}))"
    )


def test_every_curve_is_drawn_and_teachers_keep_their_colour(opened, page):
    charts = blocks(page)["report"]["charts"]
    expected = sum(len(chart["curves"]) for chart in charts if not chart["quiet"])
    assert draw_all(opened) == expected > 30
    dots = opened.run("return [...document.querySelectorAll('.tile .dot')].map((dot) => dot.style.background)")
    strokes = opened.run(
        "return [...document.querySelectorAll('.chart')].filter((chart) =>"
        "  ['Keep rate', 'Reverse KL of the samples', 'Filter\\'s threshold', 'Teachers\\' scoring']"
        "    .includes(chart.querySelector('h3').textContent))"
        ".map((chart) => [...chart.querySelectorAll('.scatterlayer .js-line')].slice(0, 2)"
        "  .map((line) => line.style.stroke))"
    )
    assert len(strokes) == 4 and len(set(dots)) == 2 and all(lines == dots for lines in strokes)
    titles = opened.run("return [...document.querySelectorAll('.chart h3')].map((title) => title.textContent)")
    assert {"Loss", "Keep rate", "Length", "Step by phase", "Reverse KL on held-out prompts"} <= set(titles)
    assert opened.run("return document.querySelector('.tile').textContent") == "Steps3 of 3done", "as status.json says"


def test_smoothing_and_logarithms(opened):
    before = draw_all(opened)
    opened.choose("smoothing", "0.9")
    opened.until(f"return {CURVES} > arguments[0]", before)  # the values as they are, faint
    assert opened.run("return document.getElementById('smoothing-value').value") == "0.90"
    loss = "document.querySelector('.plot')"
    opened.run("document.querySelector('.plot').scrollIntoView(); document.getElementById('log-scale').click()")
    opened.until(f"return {loss}.layout.yaxis.type === ({loss}.data[0].y.every((v) => v > 0) ? 'log' : 'linear')")


def test_shading_follows_the_chosen_quantity(opened, run_dir):
    opened.choose("step-choice", "1")
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    samples = [sample for sample in samples if sample["step"] == 1]
    seen = {}
    for quantity in ("weight", "confidence", "confusion", "log_prob_gap"):
        opened.choose("shade-choice", quantity)
        shown = cards(opened)
        assert [card["response"] for card in shown] == [sample["response"] for sample in samples]
        seen[quantity] = [card["shades"] for card in shown]
        for card, sample in zip(shown, samples, strict=True):
            assert len(card["shades"]) == sample["tokens"]
            assert all(card["shades"]) == (quantity != "weight" or sample["kept"]), "a weight only where it trained"
    assert len({json.dumps(shades) for shades in seen.values()}) == 4
    assert "confusion" in opened.run(
        "const s = document.getElementById('shade-choice'); s.value = 'confusion';"
        "s.dispatchEvent(new Event('change')); return document.getElementById('scale').textContent"
    )
    sample = next(sample for sample in samples if len(set(sample["by_token"]["confidence"])) > 2)
    shades = seen["confidence"][samples.index(sample)]
    reds = [int(shade.removeprefix("rgb(").split(",")[0]) for shade in shades]
    in_order = sorted(range(len(reds)), key=lambda i: sample["by_token"]["confidence"][i])
    assert len(set(reds)) > 1 and [reds[i] for i in in_order] == sorted(reds, reverse=True), "the surer, the darker"


def test_text_is_readable_on_every_shade(opened):
    contrast = """
      const luminance = (colour) => colour.match(/\\d+/g).slice(0, 3).map((c) => c / 255)
        .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
      return Math.min(...[...document.querySelectorAll('.response span')].map((token) => {
        const [a, b] = [luminance(getComputedStyle(token).color), luminance(token.style.background || 'rgb(0,0,0)')];
        return token.style.background ? (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) : 21;
      }))"""
    for scheme in ("light", "dark"):
        opened.scheme(scheme)
        backgrounds = set()
        for quantity in ("weight", "confidence", "confusion", "log_prob_gap"):
            opened.choose("shade-choice", quantity)
            backgrounds |= {shade for card in cards(opened) for shade in card["shades"]}
            assert opened.run(contrast) >= 4.5, (scheme, quantity)
        assert len(backgrounds) > 10


def test_dropped_trajectories_tell_why(opened, run_dir):
    opened.choose("step-choice", "2")
    opened.choose("kept-choice", "dropped")
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    dropped = [sample for sample in samples if sample["step"] == 2 and not sample["kept"]]
    shown = cards(opened)
    assert len(shown) == len(dropped) >= 1
    for card, sample in zip(shown, dropped, strict=True):
        assert "dropped" in card["kind"] and "dropped: below_threshold" in card["facts"]
        for number in (sample["mean_log_prob"], sample["threshold"]):
            assert f"−{abs(number):.4g}" in card["facts"]
    opened.choose("kept-choice", "kept")
    assert not any("dropped" in card["facts"] for card in cards(opened))
    opened.choose("teacher-choice", "math")
    assert {card["facts"][:4] for card in cards(opened)} <= {"math"}


def test_a_tokens_numbers_are_shown_to_pointer_and_keys(opened, run_dir):
    sample = json.loads((run_dir / "samples.jsonl").read_text().splitlines()[0])
    opened.choose("step-choice", "1")
    cards(opened)
    tip = "return document.getElementById('tip').hidden ? '' : document.getElementById('tip').textContent"
    first = "document.querySelector('.response span')"
    opened.run(f"{first}.dispatchEvent(new PointerEvent('pointerover', {{bubbles: true}}))")
    text = opened.until(tip)
    assert json.dumps(sample["by_token"]["text"][0]) in text and "place1 of" in text
    for name in ("confidence", "teacher_log_prob"):
        assert f"{abs(sample['by_token'][name][0]):.3g}"[:4] in text, (name, text)
    opened.run("document.querySelector('.response').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}))")
    assert "place2 of" in opened.run(tip)
    opened.run("document.querySelector('.response').dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))")
    assert opened.run(tip) == ""


def test_markup_from_a_run_is_text(opened):
    shown = cards(opened)
    assert all(card["prompt"].endswith(ATTACK) for card in shown) and shown[-1]["response"] == ATTACK
    assert opened.run("return document.images.length + document.querySelectorAll('main script, main b').length") == 0
    assert opened.driver.title == "tiny"


def test_several_runs_and_one_without_a_step(browser, run_dir, tmp_path):
    new = tmp_path / "new"
    new.mkdir()
    (new / "recipe.yaml").write_text((run_dir / "recipe.yaml").read_text().replace("tiny", "second"))
    out = tmp_path / "both.html"
    assert main(["report", str(new), "--out", str(tmp_path / "new.html")]) == 0
    browser.open(tmp_path / "new.html")
    text = browser.run("return document.querySelector('main').innerText")
    assert "No step has been logged yet" in text and "metrics.samples" in text
    (new / "metrics.jsonl").write_text((run_dir / "metrics.jsonl").read_text())
    assert main(["report", str(run_dir), str(new), "--out", str(out), "--max-samples", "5"]) == 0
    browser.open(out)
    names = browser.run("return [...document.querySelectorAll('.run h3')].map((title) => title.textContent)")
    assert names == ["tiny", "second"]
    browser.until("return document.querySelectorAll('.plot .trace').length")
    drawn = browser.run("return document.querySelector('.plot').data.map((curve) => [curve.name, curve.line.dash])")
    assert drawn == [["tiny", "solid"], ["second", "dash"]]
    assert "of 19 sampled trajectories of tiny" in browser.run("return document.body.textContent")
    assert browser.console() == []


def test_a_large_run_opens(browser, run_dir, tmp_path):
    """10,000 steps and 2,000 trajectories of 100 tokens, each with numbers of its own, as are those of the run."""
    noise = random.Random(0)
    last = read_metrics(run_dir)[-1]
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    columns = next(sample["by_token"] for sample in samples if sample["kept"])
    with (tmp_path / "metrics.jsonl").open("w") as stream:
        for step in range(1, 10_001):
            values = {key: value * (1 + noise.random()) for key, value in last.items()}
            stream.write(json.dumps({**values, "step": step}) + "\n")
    with (tmp_path / "samples.jsonl").open("w") as stream:
        for number in range(2_000):
            numbers = {key: [round(noise.random(), 4) for _ in range(100)] for key in columns if key != "text"}
            texts = [f" word{noise.randrange(999)}" for _ in range(100)]
            line = {"step": 1 + number // 4, "row": number % 4, "teacher": "math", "kept": True, "tokens": 100}
            line |= {"response": "".join(texts), "by_token": {"text": texts, **numbers}}
            stream.write(json.dumps(line) + "\n")
    started = time.process_time()
    assert main(["report", str(tmp_path), "--max-samples", "2000"]) == 0
    made = time.process_time() - started
    page = tmp_path / "report.html"
    started = time.perf_counter()
    browser.open(page)
    opened = time.perf_counter() - started
    print(f"{len(last)} keys, {page.stat().st_size / 1e6:.1f} MB; made in {made:.1f} s of CPU, open in {opened:.1f} s")
    assert page.stat().st_size < 16e6
    assert draw_all(browser) > 30 and browser.run("return document.querySelectorAll('.barlayer .trace').length") == 0
    browser.choose("step-choice", "250")
    assert [len(card["shades"]) for card in cards(browser)] == [100] * 4
    assert browser.console() == []


def test_mistakes(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("run: {name: a}")
    for arguments, message in (
        ([str(tmp_path / "none")], "no such folder"),
        ([str(tmp_path.parent / "no")], "no such folder"),
        ([str(tmp_path), "--max-samples", "-1"], "--max-samples -1: give at least 0"),
        ([str(tmp_path), "--max-tokens", "-1"], "--max-tokens -1: give at least 0"),
        ([str(tmp_path), "--out", str(tmp_path / "a" / "b.html")], "cannot be written"),
    ):
        assert main(["report", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and message in said and said.count("\n") == 1


def test_it_is_light(tmp_path):
    """No torch is imported, which takes seconds."""
    (tmp_path / "recipe.yaml").write_text("run: {name: a}")
    code = "import sys; from fire_megatron.cli.main import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    said = call("-c", code, "report", tmp_path)
    assert said.splitlines()[-1] == "False" and "report.html: " in said
