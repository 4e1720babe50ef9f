"""What a run's next start makes of its last words."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fire_megatron.config.errors import TrainingError
from fire_megatron.platform.launch import Restart
from fire_megatron.train.status import STATUS_FILE, RunStatus, begin, note_failure, read_status, write_status


def start(folder, *, saved=None, restart=Restart.LAUNCHER, most=2):
    """A start of the run, written down."""
    status = begin(folder, saved=saved, restart=restart, max_restarts=most)
    write_status(folder, status)
    return status


def test_restarts_in_a_row_are_counted(tmp_path):
    assert [start(tmp_path, restart=how).restarts for how in (Restart.NO, Restart.LAUNCHER, Restart.SCHEDULER)] == [
        0,
        1,
        2,
    ]
    with pytest.raises(TrainingError, match=r"failed 3 times in a row before its first checkpoint.*max_restarts=2"):
        start(tmp_path)
    assert start(tmp_path, restart=Restart.NO).restarts == 0, "by hand it may always be tried"


def test_a_new_checkpoint_counts_anew(tmp_path):
    start(tmp_path, restart=Restart.NO)
    for saved in (1, 2, 3, 4):
        assert start(tmp_path, saved=saved).restarts == 1
    assert start(tmp_path, saved=4).restarts == 2
    with pytest.raises(TrainingError, match="after the checkpoint of step 4"):
        start(tmp_path, saved=4)


def stop(folder):
    """The run is asked to stop."""
    write_status(folder, replace(read_status(folder), state="stopped"))


def test_stops_without_anything_new_saved_count(tmp_path):
    start(tmp_path, restart=Restart.NO)
    for restarts in (1, 2):
        stop(tmp_path)
        assert start(tmp_path, restart=Restart.SCHEDULER).restarts == restarts
    stop(tmp_path)
    with pytest.raises(TrainingError, match=r"failed or been stopped 3 times in a row before its first.*time limit"):
        start(tmp_path, restart=Restart.SCHEDULER)
    assert start(tmp_path, restart=Restart.NO).restarts == 0
    write_status(tmp_path, replace(read_status(tmp_path), saved=4, restarts=0, progress=True))
    stop(tmp_path)
    for restarts in (0, 1):
        assert start(tmp_path, saved=4, restart=Restart.SCHEDULER).restarts == restarts, "the first one saved something"
        stop(tmp_path)


def test_the_status_of_an_earlier_version(tmp_path):
    values = {"state": "stopped", "step": 0, "saved": None, "restarts": 0, "error": None, "hopeless": False, "time": 1}
    (tmp_path / STATUS_FILE).write_text(json.dumps(values))
    assert start(tmp_path, restart=Restart.SCHEDULER).restarts == 0


@pytest.mark.parametrize("state", ["done", "stopped"])
def test_what_ended_well_does_not_count(tmp_path, state):
    write_status(tmp_path, RunStatus(state, 3, 3, restarts=2))
    assert start(tmp_path, saved=3, restart=Restart.SCHEDULER).restarts == 0


def test_a_mistake_is_not_tried_again_by_the_launcher(tmp_path):
    start(tmp_path, restart=Restart.NO)
    note_failure(tmp_path, "run.foo: wrong", hopeless=True)
    for _ in range(3):
        with pytest.raises(TrainingError, match="^not restarted, since it would fail again: run.foo: wrong$") as error:
            start(tmp_path)
        note_failure(tmp_path, str(error.value), hopeless=True)
    assert start(tmp_path, restart=Restart.SCHEDULER).restarts == 1, "the user may have put it right"


def test_what_passes_is_tried_again(tmp_path):
    start(tmp_path, restart=Restart.NO)
    note_failure(tmp_path, "teachers.math did not answer", hopeless=False)
    assert read_status(tmp_path).error == "teachers.math did not answer"
    assert start(tmp_path).restarts == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": "running", "colour": 1}', "null"])
def test_a_file_that_says_nothing(tmp_path, text):
    (tmp_path / STATUS_FILE).write_text(text)
    assert read_status(tmp_path) is None
    assert start(tmp_path).restarts == 0


def test_the_file(tmp_path):
    write_status(tmp_path / "run", RunStatus("running", 4, 2))
    values = json.loads((tmp_path / "run" / STATUS_FILE).read_text())
    assert (values["state"], values["step"], values["saved"]) == ("running", 4, 2) and values["time"] > 1e9
    assert [path.name for path in (tmp_path / "run").iterdir()] == [STATUS_FILE]
