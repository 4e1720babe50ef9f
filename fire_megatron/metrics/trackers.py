"""Services that keep the curves of many runs: TensorBoard, Weights & Biases and MLflow, each by its own library.

Projects, servers and accounts are told in the libraries' own way (``WANDB_PROJECT``, ``WANDB_MODE``,
``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``).
"""

from __future__ import annotations

import os
import re
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from fire_megatron.config.checkpoints import read_json_object
from fire_megatron.metrics.jsonl import replace_json

TENSORBOARD_FOLDER = "tensorboard"
TRACKERS_FILE = "trackers.json"
"""In the run's folder: what each service calls the run, and the last steps that it has been told of."""
PROJECT = "fire_megatron"
"""Name of project or experiment, where the environment names none."""


class Tracker(Protocol):
    """One service, told of one run."""

    def log(self, step: int, metrics: Mapping[str, float], kind: str) -> None:
        """Tell it finite numbers of a step; ``kind`` is ``step`` or ``evaluation``."""
        ...

    def close(self) -> None:
        """Finish. Called as an exception passes where the run fails."""
        ...


class TensorBoard:
    """Event files in the run's folder; raises ImportError where the package is not installed."""

    def __init__(self, run_dir: Path, logged: int) -> None:
        """Args: logged: last step whose points stay."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / TENSORBOARD_FOLDER), purge_step=logged + 1)

    def log(self, step: int, metrics: Mapping[str, float], kind: str) -> None:
        """See :class:`Tracker`."""
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        """See :class:`Tracker`."""
        self._writer.close()


class _Account:
    """What a service knows of the run, kept in the run's folder, so that a resumed run goes on with its curves."""

    def __init__(self, run_dir: Path, service: str, *, resumed: bool) -> None:
        self._path, self._service = run_dir / TRACKERS_FILE, service
        known = (read_json_object(self._path) or {}).get(service, {}) if resumed else {}
        self.run_id: str | None = known.get("id")
        self._told: dict[str, int] = known.get("told", {})
        self.calls: int = known.get("calls", 0)
        """How often it has been told something."""

    def is_new(self, step: int, kind: str) -> bool:
        """Whether the service has not been told yet. A resumed run repeats steps that were not saved, and points cannot
        be taken back."""
        return step > self._told.get(kind, -1)

    def note(self, step: int, kind: str) -> None:
        """It is told now."""
        self._told[kind] = step
        self.calls += 1
        self.save()

    def save(self) -> None:
        """Keep it."""
        others = read_json_object(self._path) or {}
        replace_json(self._path, others | {self._service: {"id": self.run_id, "told": self._told, "calls": self.calls}})


class WandB:
    """Weights & Biases. Offline (``WANDB_MODE=offline``) its files are in the run's folder, for ``wandb sync``."""

    def __init__(self, run_dir: Path, name: str, settings: Mapping[str, Any], *, resumed: bool) -> None:
        """Args: name: of the run; settings: its recipe; resumed: whether it goes on with an earlier start's curves."""
        import wandb

        self._account = _Account(run_dir, "wandb", resumed=resumed)
        self._account.run_id = self._account.run_id or secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            id=self._account.run_id,
            resume="allow",
            dir=str(run_dir),
            config=dict(settings),
            settings=wandb.Settings(console="off"),
        )
        self._run.define_metric("*", step_metric="step")
        self._account.save()

    def log(self, step: int, metrics: Mapping[str, float], kind: str) -> None:
        """See :class:`Tracker`."""
        if self._account.is_new(step, kind):
            # Its own count may not fall, while an evaluation may be told after later steps: of a resumed run.
            self._run.log({"step": step, **metrics}, step=max(self._account.calls, self._run.step))
            self._account.note(step, kind)

    def close(self) -> None:
        """See :class:`Tracker`."""
        self._run.finish(exit_code=1 if sys.exc_info()[0] else 0)


class MLflow:
    """MLflow; without ``MLFLOW_TRACKING_URI`` in ``mlruns`` of the run's folder."""

    def __init__(self, run_dir: Path, name: str, settings: Mapping[str, Any], *, resumed: bool) -> None:
        """Args: see :class:`WandB`."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # it has to be asked for
            uri = (run_dir / "mlruns").absolute().as_uri()
        self._client, self._account = MlflowClient(tracking_uri=uri), _Account(run_dir, "mlflow", resumed=resumed)
        if self._account.run_id is None:
            experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self._client.get_experiment_by_name(experiment)
            number = found.experiment_id if found else self._client.create_experiment(experiment)
            self._account.run_id = self._client.create_run(number, run_name=name).info.run_id
            params = [Param(key, str(value)[:500]) for key, value in _flat(settings)]
            for start in range(0, len(params), 100):  # the most at a time
                self._client.log_batch(self._account.run_id, params=params[start : start + 100])
            self._account.save()
        else:
            self._client.update_run(self._account.run_id, status="RUNNING")

    def log(self, step: int, metrics: Mapping[str, float], kind: str) -> None:
        """See :class:`Tracker`. Signs that MLflow does not allow in names, as in ``avg@8``, become ``_``, and ``/`` a
        dot: without a server each name is a file, and ``loss`` and ``loss/clip_fraction`` cannot both be."""
        from mlflow.entities import Metric

        if self._account.is_new(step, kind):
            now = int(1000 * time.time())
            points = [
                Metric(re.sub(r"[^\w\-. ]", "_", key.replace("/", ".")), value, now, step)
                for key, value in metrics.items()
            ]
            self._client.log_batch(self._account.run_id, metrics=points)
            self._account.note(step, kind)

    def close(self) -> None:
        """See :class:`Tracker`."""
        self._client.set_terminated(self._account.run_id, "FAILED" if sys.exc_info()[0] else "FINISHED")


SERVICES = {"wandb": WandB, "mlflow": MLflow}
"""By their names in ``metrics.trackers``."""


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested mappings."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
