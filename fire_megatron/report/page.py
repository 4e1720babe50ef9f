"""The report as one HTML file that needs no network: plotly's JavaScript, the data and the page's own code are in it.

What came from a run is only ever data to the page: gzipped JSON in base64, which its code shows as text and never as
markup. A content policy allows no script but the page's own and no address at all.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import secrets
import string
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import fire_megatron
from fire_megatron.config.errors import UserError
from fire_megatron.metrics.jsonl import finite
from fire_megatron.metrics.progress import progress_bar
from fire_megatron.platform.files import write_whole
from fire_megatron.report.charts import SECTIONS, make_charts
from fire_megatron.report.read import RunData
from fire_megatron.report.trajectories import Shades, body, index_line

_ASSETS = "fire_megatron.report.assets"
_SCRIPTS = ("page.js", "charts.js", "trajectories.js")


def write_report(runs: Sequence[RunData], target: Path) -> None:
    """Write the page of one run, or of several whose curves are laid over each other.

    Raises:
        UserError: plotly is not installed, or the file cannot be written.
    """
    library = _plotly()
    try:
        write_whole(target, _page(runs, library))
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); choose another place with --out") from error


def _plotly() -> str:
    """Its JavaScript: well kept, and whole in the Python package."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("a report needs plotly, which is not installed; pip install plotly") from None
    return get_plotlyjs()


def _page(runs: Sequence[RunData], library: str) -> Iterator[str]:
    report: dict[str, Any] = {
        "version": fire_megatron.__version__,
        "made": time.strftime("%Y-%m-%d %H:%M %Z"),
        "sections": SECTIONS,
        "runs": [_run(run, name) for run, name in zip(runs, _names(runs), strict=True)],
        "teachers": list(dict.fromkeys(name for run in runs for name in run.teachers)),
        "charts": make_charts(runs),
    }
    nonce = secrets.token_urlsafe(16)
    before, _, after = _asset("page.html").partition("<!-- blocks -->")
    fill = {
        "nonce": nonce,
        "title": html.escape(" and ".join(_names(runs))),
        "style": _asset("page.css"),
        "script": "\n".join(_asset(name) for name in _SCRIPTS),
    }
    yield string.Template(before).substitute(fill)
    yield _block("library", library.encode())
    # Each by itself, so that a browser unpacks those that are looked at, and here there is one at a time in memory.
    total = sum(len(run.samples) for run in runs)
    index, shades = [], Shades(total)
    samples = ((number, sample) for number, run in enumerate(runs) for sample in run.samples)
    for number, sample in progress_bar(samples, total=total, desc="trajectories", delay=1, leave=False):
        shown = body(sample)
        shades.see(shown)
        yield _block(f"trajectory-{len(index)}", _json(shown))
        index.append(index_line(number, sample))
    report |= {"trajectories": index, "quantities": [asdict(quantity) for quantity in shades.quantities()]}
    yield _block("report", _json(report))
    yield string.Template(after).substitute(fill)


def _block(name: str, content: bytes) -> str:
    # A library's or a model's text may hold what ends a script element; base64 cannot.
    packed = base64.b64encode(gzip.compress(content, compresslevel=6, mtime=0)).decode()
    return f'<script type="application/gzip" id="{name}">{packed}</script>\n'


def _json(value: Any) -> bytes:
    def dump(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))

    try:
        text = dump(value)
    except ValueError:  # the logger writes no infinities, but JSON files may hold some
        text = dump(finite(value))
    return text.encode("utf-8", "replace")


def _asset(name: str) -> str:
    return (resources.files(_ASSETS) / name).read_text(encoding="utf-8")


def _names(runs: Sequence[RunData]) -> list[str]:
    """``run.name`` of each; with the folder where two runs have the same, and a number where that is the same too."""
    names = [run.name for run in runs]
    names = [f"{run.name} ({run.folder.name})" if names.count(run.name) > 1 else run.name for run in runs]
    return [f"{name} #{number}" if names.count(name) > 1 else name for number, name in enumerate(names, 1)]


def _run(run: RunData, name: str) -> dict[str, Any]:
    trained = [line for line in run.metrics if line["step"] > 0]
    return {
        "name": name,
        "folder": str(run.folder),
        "steps": [line["step"] for line in run.metrics],
        "done": run.steps_done,
        "total": run.total_steps,
        "first": trained[0] if trained else {},
        "last": trained[-1] if trained else {},
        "seconds": sum(_number(line, "time/step") for line in trained),
        "checkpoints": run.checkpoints,
        "state": run.state,
        "error": run.error,
        "recipe": run.recipe_text,
        "changes": run.recipe_changes,
        "shown": len(run.samples),
        "sampled": run.num_samples,
        "notes": run.notes,
    }


def _number(line: Mapping[str, Any], key: str) -> float:
    value = line.get(key)
    return float(value) if type(value) in (int, float) else 0.0
