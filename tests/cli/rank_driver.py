"""Run by torchrun: the training command once a case, on every rank, with one rank spoilt where a case says so.

Each case meets at a port of its own, with the store in rank 0 as under srun, so that one launch serves them all. Reads
cases from a JSON file (a list of mappings: ``arguments``, ``port``, perhaps ``spoilt`` and ``rank``) and leaves beside
it what each rank made of them. Exits with the largest code of any.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import sys
import time
from pathlib import Path
from unittest import mock

from fire_megatron.checkpoint.torch_dist import ShardReader
from fire_megatron.cli.train import main
from fire_megatron.config.errors import CheckpointError, DataError, RecipeError
from fire_megatron.train import inputs, run_folder


def _raises(error):
    return mock.Mock(side_effect=error)


@contextlib.contextmanager
def file_limit(size):
    """Let writing fail beyond a size, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


SPOILT = {
    "prompts": lambda: mock.patch.object(inputs, "read_prompts", _raises(DataError("rank-local: prompts"))),
    "plugin": lambda: mock.patch.object(inputs, "registered_hooks", lambda: ["mine"]),
    "files": lambda: mock.patch.object(ShardReader, "check_files", _raises(CheckpointError("rank-local: files"))),
    "chunk": lambda: mock.patch.object(ShardReader, "_chunk", _raises(CheckpointError("rank-local: chunk"))),
    "run folder": lambda: mock.patch.object(
        run_folder, "MetricsLogger", _raises(RecipeError("rank-local: run folder"))
    ),
    "disk": lambda: file_limit(4096),
}
"""What goes wrong on one rank only."""


def run(case: dict, rank: int) -> dict:
    """One start of the training command; what this rank made of it."""
    os.environ["MASTER_PORT"] = str(case["port"])
    spoilt = case.get("spoilt") if rank == case.get("rank") else None
    arguments = ["--recipe", "absent.yaml"] if spoilt == "recipe" else case["arguments"]
    output, errors, started = io.StringIO(), io.StringIO(), time.monotonic()
    with (
        SPOILT.get(spoilt, contextlib.nullcontext)(),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        code = main(arguments)
    seconds = time.monotonic() - started
    return {"code": code, "output": output.getvalue(), "errors": errors.getvalue(), "seconds": seconds}


if __name__ == "__main__":
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    cases, own = Path(sys.argv[1]), int(os.environ["RANK"])
    results = [run(case, own) for case in json.loads(cases.read_text())]
    cases.with_name(f"rank{own}.json").write_text(json.dumps(results))
    sys.exit(max(result["code"] for result in results))
