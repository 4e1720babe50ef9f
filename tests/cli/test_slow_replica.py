"""Replicas whose sampling takes very different times: the others wait as long as it gets on, and no longer.

One run of two replicas. From its first sampling on, collectives are given few seconds only. In step 1 the second
replica samples for longer than that; in step 2 it hangs.
"""

from __future__ import annotations

import subprocess

from processes import ROOT, TRAIN, command, environment, free_ports
from tiny_run import read_metrics, tiny_recipe, write_recipe

from fire_megatron.platform.watch import EXIT_CODE
from fire_megatron.train.status import read_status

TIMEOUT, SLOW = 4.0, 5.5
"""Seconds that a collective may take, and that the slow replica samples."""
PLUGIN = f"""
import time
import torch.distributed as dist
from fire_megatron.platform import launch
from fire_megatron.platform.watch import Watch, tick
from fire_megatron.rollout.engine import MegatronEngine

generate, judge_stall = MegatronEngine.generate, Watch._judge_stall

def impatient(watch, beats):
    # With progress only: silence is what a busy machine may be guilty of.
    kept, watch._timeout = watch._timeout, {TIMEOUT}
    try:
        return judge_stall(watch, beats)
    finally:
        watch._timeout = kept

def slow(self, *args, step, **kwargs):
    Watch._judge_stall = impatient
    for group in (self.grid.span, dist.group.WORLD):
        dist.distributed_c10d._set_pg_timeout(launch.collective_patience({TIMEOUT}), group)
    if dist.get_rank() == 1 and step == 0:
        for _ in range(int({SLOW} / 0.5)):
            time.sleep(0.5)
            tick()
    elif dist.get_rank() == 1:
        time.sleep(10_000)
    return generate(self, *args, step=step, **kwargs)

MegatronEngine.generate = slow
"""


def test_a_slow_replica_is_waited_for_and_one_that_hangs_is_named(tiny, tmp_path):
    (tmp_path / "slow_replica.py").write_text(PLUGIN)
    changes = {"run__plugins": ["slow_replica"]}
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_recipe(tiny, tmp_path / "run", **changes))
    common = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_ports(1)[0]}
    ranks = [
        subprocess.Popen(  # without torchrun, which imports torch a third time
            command(*TRAIN, recipe), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
            env=environment(tmp_path, **common, RANK=rank, LOCAL_RANK=rank),
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    assert [process.returncode for process in ranks] == [EXIT_CODE] * 2, outputs
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1], outputs
    assert lines[0]["time/rollout_wait"] > SLOW - TIMEOUT > lines[0]["time/teacher_exposed"]
    status = read_status(tmp_path / "run")
    assert status.state == "failed" and "no progress for" in status.error
    stalled, others = status.error.split("Stalled: ")[1].split("Others: ")
    assert "rank 1 (student" in stalled and "rank 0" not in stalled
    assert "rank 0 (student" in others and "waiting for the other replicas' samples" in others
    [start] = (tmp_path / "run" / "flight_recorder").iterdir()
    assert status.error.endswith(f"The last collectives of each rank: {start}/rank_*")
    assert {path.name for path in start.iterdir()} == {"rank_0", "rank_1"}
