"""20 SIGKILLs at random moments of a run that saves every step: nothing is lost beyond the last completed step, the run
always resumes, and what it ends with is what an undisturbed run ends with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import call
from tiny_run import read_metrics, tiny_recipe, write_recipe

from fire_megatron.checkpoint.steps import find_latest, saved_steps
from fire_megatron.checkpoint.torch_dist import ShardReader
from fire_megatron.cli.train import main

STEPS, KILLS, KEEP = 60, 20, 2
MACHINE = ("time/", "memory/", "rollout/tokens_per_second", "router/")


@pytest.mark.parametrize("in_background", [False, True], ids=["", "async_save"])
def test_killed_at_random_moments(tiny, tmp_path, in_background):
    kills = KILLS // 2
    values = tiny_recipe(
        tiny,
        tmp_path / "killed",
        run__steps=STEPS,
        run__threads=1,
        checkpoint={"every": 1, "keep": KEEP, "async_save": in_background},
    )
    recipe = write_recipe(tmp_path / "recipe.yaml", values)
    driver = (Path(__file__).with_name("kill_driver.py"), recipe, tmp_path / "killed", kills, 1)
    told = call(*driver, timeout=600)
    log = (tmp_path / "killed.log").read_text()
    *history, end = json.loads(told.splitlines()[-1])
    assert len(history) == kills and all(entry["died"] for entry in history), "the run was over too soon"
    for entry in history:
        newest = max(entry["saved"], default=0)
        assert max(entry["after"], default=0) >= newest, "a completed step was lost"
        # A step is told of before it is saved. In the background, the next one may be computed meanwhile.
        assert entry["told"] - newest <= (2 if in_background else 1), entry
    assert [entry["begun"] for entry in history[1:]] == [max(entry["after"], default=0) for entry in history[:-1]]
    assert end["code"] == 0, log
    resumed = [int(line.rsplit(" ", 1)[1]) for line in log.splitlines() if line.startswith("resumed from")]
    assert set(resumed) <= {entry["begun"] for entry in history} | {max(history[-1]["after"])}
    assert saved_steps(tmp_path / "killed" / "checkpoints") == [STEPS - 1, STEPS]
    left = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir())
    assert left == [f"step_{step:06d}" for step in (STEPS - 1, STEPS)], "nothing is left lying about"
    straight = tmp_path / "straight"
    assert main(["--recipe", str(recipe), f"run.dir={straight}", "checkpoint.every=0"]) == 0
    ours, theirs = read_metrics(tmp_path / "killed"), read_metrics(straight)
    assert len(ours) == len(theirs) == STEPS
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert all(a[key] == b[key] for key in b if not key.startswith(MACHINE)), f"step {a['step']}"
    a, b = (ShardReader(find_latest(run / "checkpoints") / "weights") for run in (tmp_path / "killed", straight))
    assert a.tensors.keys() == b.tensors.keys() and all((a.read(k) == b.read(k)).all() for k in a.tensors)
