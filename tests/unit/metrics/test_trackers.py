"""Weights & Biases and MLflow by their own libraries, offline: what they have of a run that was resumed."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from fire_megatron.config.errors import RecipeError
from fire_megatron.config.schema import MetricsConfig
from fire_megatron.metrics import logger as logger_module
from fire_megatron.metrics.logger import MetricsLogger

RECIPE = {"run": {"name": "first", "steps": 9}, "loss": {"hooks": []}, "plugins": []}
EXPECTED = {"loss": [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)], "eval/aime/avg@8": [(0, 0.5), (2, 0.75)]}
"""Points of each curve: those of an undisturbed run."""


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No server and no account."""
    for name in ("WANDB_PROJECT", "WANDB_ENTITY", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # ours to set, and to be taken back


def log(folder: Path, service: str, first: int, last: int, *, after: int | None = None, evaluated: int = -1) -> None:
    """Steps of a run, as one start of it logs them; ``after`` is the step that it continues from."""
    config = MetricsConfig(console=False, jsonl=False, trackers=(service,))
    start = {"start_step": -1 if after is None else after, "evaluated": evaluated}
    with MetricsLogger(folder, config, total_steps=9, enabled=True, name="first", settings=RECIPE, **start) as logger:
        for step in range(first, last + 1):
            if step:
                logger.log(step, {"loss": 1 / step, "teacher/a+b/kl": float("nan")})
            if step % 2 == 0 and step > evaluated and step < 4:
                logger.log(step, {"eval/aime/avg@8": 0.5 + step / 8})


def interrupted(folder: Path, service: str) -> None:
    """A run that dies after step 3, of which the evaluation of step 2 was not told, and continues from step 1."""
    log(folder, service, 0, 1)
    config = MetricsConfig(console=False, jsonl=False, trackers=(service,))
    with MetricsLogger(folder, config, total_steps=9, start_step=1, enabled=True, name="first") as logger:
        for step in (2, 3):
            logger.log(step, {"loss": 1 / step})
    log(folder, service, 2, 4, after=1)


def wandb_records(path: Path):
    """Records of a file that ``wandb sync`` reads: LevelDB's log format, in blocks of 32 KiB, after 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, part, at = path.read_bytes(), b"", 7
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        part, at = part + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            yield record
            part = b""


def wandb_curves(folder: Path):
    """(ids, recipes, points by key, W&B's own steps) over the files of all starts."""
    ids, configs, curves, steps = set(), [], {}, []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.parent.name):
        for record in wandb_records(path):
            if record.WhichOneof("record_type") == "run":
                ids.add((record.run.run_id, record.run.display_name, record.run.project))
                configs.append({update.key: json.loads(update.value_json) for update in record.run.config.update})
            if record.WhichOneof("record_type") == "history":
                row = {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item}
                steps.append(row["_step"])
                for key in row.keys() & {*EXPECTED, "teacher/a+b/kl"}:
                    curves.setdefault(key, []).append((row["step"], row[key]))
    return ids, configs, curves, steps


def test_wandb_continues_its_curves(tmp_path):
    pytest.importorskip("wandb")
    interrupted(tmp_path, "wandb")
    ids, configs, curves, steps = wandb_curves(tmp_path)
    [(run_id, name, project)] = ids
    assert (name, project) == ("first", "fire_megatron")
    assert json.loads((tmp_path / "trackers.json").read_text())["wandb"]["id"] == run_id
    assert configs[0].items() >= RECIPE.items()
    assert curves == EXPECTED and steps == list(range(6)), "W&B drops what comes with a step that it has had"


def test_mlflow_continues_its_curves(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    interrupted(tmp_path, "mlflow")
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    [found] = client.search_runs([client.get_experiment_by_name("fire_megatron").experiment_id])
    assert found.info.run_name == "first" and found.info.status == "FINISHED"
    assert found.data.params == {"run.name": "first", "run.steps": "9", "loss.hooks": "[]", "plugins": "[]"}
    names = {"loss": "loss", "eval/aime/avg@8": "eval.aime.avg_8"}
    histories = {key: client.get_metric_history(found.info.run_id, name) for key, name in names.items()}
    assert {key: [(m.step, m.value) for m in points] for key, points in histories.items()} == EXPECTED


@pytest.mark.parametrize("service", ["wandb", "mlflow"])
def test_a_fresh_run_in_the_folder_is_another_run(tmp_path, service):
    pytest.importorskip(service)
    ids = set()
    for _ in range(2):
        log(tmp_path, service, 0, 1)
        ids.add(json.loads((tmp_path / "trackers.json").read_text())[service]["id"])
    assert len(ids) == 2


class Broken:
    """A service that takes a step and no more."""

    def __init__(self, *args, **options):
        self.left = 1

    def log(self, step, metrics, kind):
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("no route")

    def close(self):
        raise ConnectionError("no route")


def test_a_service_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(logger_module.SERVICES, "wandb", Broken)
    config = MetricsConfig(trackers=("wandb",))
    with MetricsLogger(tmp_path, config, total_steps=9, start_step=-1, enabled=True) as logger:
        for step in (1, 2, 3):
            logger.log(step, {"loss": 1.0})
    out = capsys.readouterr().out
    assert out.count("WARNING: wandb takes no more metrics (ConnectionError: no route)") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_service_that_cannot_begin_ends_a_fresh_run_and_no_other(tmp_path, monkeypatch, capsys):
    def refused(*args, **options):
        raise ConnectionError("no account")

    monkeypatch.setitem(logger_module.SERVICES, "wandb", refused)
    config = MetricsConfig(trackers=("wandb",))
    with pytest.raises(RecipeError, match=r"metrics.trackers: wandb cannot begin \(ConnectionError: no account\)"):
        MetricsLogger(tmp_path, config, total_steps=9, start_step=-1, enabled=True)
    MetricsLogger(tmp_path, config, total_steps=9, start_step=3, enabled=True).close()
    assert "WARNING: metrics.trackers: wandb cannot begin" in capsys.readouterr().out
