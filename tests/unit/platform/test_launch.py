"""The launcher's variables: torchrun's, Slurm's, or none."""

from __future__ import annotations

import os
import resource
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import call, command, free_ports
from processes import environment as environment_of

from fire_megatron.config.errors import LayoutError, UserError
from fire_megatron.platform import launch
from fire_megatron.platform.device import Device

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "2", "SLURM_NTASKS_PER_NODE": "3"}
MEETING = ("MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def launcher(monkeypatch):
    """``launcher(**variables)``: these and no others."""
    for name in (*TORCHRUN, *SLURM, *MEETING):
        monkeypatch.delenv(name, raising=False)

    def set_variables(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.fixture
def leave():
    """Leaves the run after the test, and gives back the number of threads."""
    threads = torch.get_num_threads()
    yield
    launch.stop()
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("variables", "rank", "size"),
    [({}, 0, 1), (TORCHRUN, 5, 8), (SLURM, 3, 6), ({**SLURM, **TORCHRUN}, 5, 8)],
    ids=["plain", "torchrun", "srun", "torchrun in a Slurm job"],
)
def test_rank_and_size(variables, rank, size, launcher):
    launcher(**variables)
    assert (launch.launched_rank(), launch.launched_world_size()) == (rank, size)


@pytest.mark.parametrize("name", ["RANK", "SLURM_PROCID"])
@pytest.mark.parametrize("value", ["", "one", "1.0"])
def test_a_variable_that_is_no_number(name, value, launcher):
    launcher(**{name: value})
    with pytest.raises(LayoutError, match=f"environment variable {name}='{value}' is not a whole number"):
        launch.launched_rank()


def test_a_plain_process(launcher, leave):
    launcher()
    world = launch.start("cpu", threads=3)
    assert world == launch.World(0, 1, 0, 1, Device("cpu")) and world.is_main
    assert dist.get_world_size() == 1 and dist.get_backend() == "gloo"
    assert torch.get_num_threads() == 3


def test_local_places_under_srun(launcher, leave):
    """One task, but neither the first of its node nor alone there."""
    launcher(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="1", SLURM_LOCALID="2", SLURM_NTASKS_PER_NODE="3")
    world = launch.start("cpu", threads=1)
    assert (world.local_rank, world.local_size) == (2, 3)


@pytest.mark.parametrize("local_size", [1, 2, 10_000])
def test_ranks_share_the_cores_of_their_node(local_size, launcher, leave):
    launcher(LOCAL_WORLD_SIZE=str(local_size))
    launch.start("cpu")
    assert torch.get_num_threads() == max(1, len(os.sched_getaffinity(0)) // local_size)


def test_a_run_can_be_joined_again_after_it_was_left(launcher, leave):
    launcher()
    for _ in range(2):
        launch.start("cpu", threads=1)
        launch.stop()
    launch.stop()
    assert not dist.is_initialized()


def test_srun_without_a_meeting_point(launcher, leave):
    launcher(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="2")
    with pytest.raises(LayoutError, match="rank 0 of 2 cannot meet the others .*set MASTER_ADDR and MASTER_PORT"):
        launch.start("cpu", timeout=1, threads=1)


def test_a_rank_that_does_not_come(launcher, leave):
    launcher(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_ports(1)[0]))
    with pytest.raises(LayoutError, match="rank 0"):
        launch.raise_on_any_rank("a problem", timeout=1)


def test_a_problem_of_the_only_rank(launcher):
    launcher()
    launch.raise_on_any_rank(None)
    with pytest.raises(UserError, match="^a problem$"):
        launch.raise_on_any_rank("a problem")


LATE = """
import sys, time
from fire_megatron.config.errors import UserError
from fire_megatron.platform import launch

class Late:
    def __init__(self, store):
        self.store = store
    def __getattr__(self, name):
        return getattr(self.store, name)
    def add(self, key, number):
        result = self.store.add(key, number)
        if key == "told":
            time.sleep(1.0)
        return result

meeting = launch._meeting
if launch.launched_rank() == 1:
    launch._meeting = lambda timeout: Late(meeting(timeout))
try:
    launch.raise_on_any_rank("wrong", timeout=60)
except UserError as error:
    print(error)
"""


def test_the_store_stays_until_the_last_rank_has_asked_it(launcher):
    """Where no launcher holds it, it goes with rank 0, and torch would write a backtrace below a good message."""
    port = free_ports(1)[0]
    ranks = []
    for rank in (0, 1):
        own = environment_of(RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        ranks.append(subprocess.Popen(command("-c", LATE), env=own, **pipes))
    assert [process.communicate(timeout=120) for process in ranks] == [("wrong\n", "")] * 2


ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
RECORDS = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
NAMES = (*ALLOCATOR, "TORCH_GLOO_LAZY_INIT", *RECORDS, "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", "FIRE_MEGATRON_DEFAULTS")


@pytest.fixture
def environment(monkeypatch):
    """``environment(**own)``: these of the variables that torch reads, and no others."""
    for name in NAMES:
        monkeypatch.setenv(name, "")  # to be put back after the test
        monkeypatch.delenv(name)

    def set_variables(**own):
        for name, value in own.items():
            monkeypatch.setenv(name, value)

    return set_variables


def told(*names):
    return tuple(os.environ.get(name) for name in names)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, ("expandable_segments:True", None, "1")),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"},
            (None, "max_split_size_mb:64,expandable_segments:True", "1"),
        ),
        (
            {"PYTORCH_ALLOC_CONF": "expandable_segments:False", "TORCH_GLOO_LAZY_INIT": "0"},
            ("expandable_segments:False", None, "0"),
        ),
        (
            {"PYTORCH_ALLOC_CONF": "", "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"},
            ("", "backend:cudaMallocAsync", "1"),
        ),
    ],
)
def test_what_torch_is_told(own, expected, environment):
    """In every version that reads one name of the allocator's settings or the other; the user's own stay."""
    environment(**own)
    launch._prepare_torch(300.0)
    assert told(*ALLOCATOR, "TORCH_GLOO_LAZY_INIT") == expected
    assert told("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC") == (None,)
    launch._prepare_torch(600.0)
    assert told("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC") == ("750",), "longer than the watch waits"
    launch._prepare_torch(300.0)
    assert told("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC") == (None,), "what an earlier run in this process has set"


@pytest.fixture
def records(environment, launcher, leave, tmp_path):
    """``records(**own)``: the prefix of this start's records, of which it makes the folder."""

    def prepare(**own):
        environment(**own)
        launcher()
        launch._prepare_records(tmp_path / "records", make=True, timeout=10.0)
        return told(*RECORDS)

    return prepare


def test_records_of_each_start_have_a_folder_of_their_own(records, tmp_path, monkeypatch):
    """Named to every version of torch; one that nothing was written to goes, those of a failure stay."""
    folder, prefixes = tmp_path / "records", []
    for hour in ("01", "02", "03"):
        monkeypatch.setattr(launch.time, "strftime", lambda form, hour=hour: f"day_{hour}")
        present, older = records()
        assert present == older == f"{folder}/day_{hour}/rank_", "what an earlier run in this process has set"
        prefixes.append(present)
        if hour == "01":
            Path(f"{present}5").write_text("of a failure")
    assert sorted(path.name for path in folder.iterdir()) == ["day_01", "day_03"]
    launch._prepare_records(None, make=True, timeout=10.0)
    assert told(*RECORDS) == (None, None), "a run that keeps no records writes to nobody else's folder"


@pytest.mark.parametrize("name", RECORDS)
def test_records_that_the_user_has_named(name, records):
    assert records(**{name: "/own"}) == tuple("/own" if name == each else None for each in RECORDS)


def test_a_process_started_by_a_run_tells_its_defaults_from_the_users_settings(environment, records, tmp_path):
    """It has the whole environment, and another timeout and folder."""
    environment(TORCH_GLOO_LAZY_INIT="0")
    launch._prepare_torch(600.0)
    records()
    code = (
        "import os; from pathlib import Path; from fire_megatron.platform import launch\n"
        "launch._prepare_torch(900.0); launch._prepare_records(Path('/other'), make=False, timeout=10.0)\n"
        f"print(*(os.environ[name] for name in {(*RECORDS, 'TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC')}))\n"
        "assert os.environ['TORCH_GLOO_LAZY_INIT'] == '0'\n"
    )
    present, older, patience = call("-c", code).split()
    assert present == older and present.startswith("/other/") and patience == "1125"


def test_as_many_open_files_as_there_may_be(launcher, leave):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    launcher()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, limits[1]), limits[1]))
        launch.start("cpu", threads=1)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (limits[1], limits[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
