"""An ``apex`` that is not NVIDIA's ends a run with exit code 2 on every rank, before megatron-core would import it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import make_inputs, read_metrics, tiny_recipe, write_recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Models and prompts."""
    return make_inputs(tmp_path_factory.mktemp("apex"), num_hidden_layers=1)


def install(site: Path, version: str, *modules: str, source: str = "") -> Path:
    """A distribution of that name, as pip leaves it."""
    info = site / f"apex-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: apex\nVersion: {version}\n")
    for module in ("", *modules):
        (site / "apex" / module).mkdir(parents=True, exist_ok=True)
        (site / "apex" / module / "__init__.py").write_text("" if module else source)
    return site


def run(inputs, tmp_path, site, *arguments, ranks=1, cwd=None):
    """Exit code and output of the training command with ``site`` on the path."""
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_recipe(inputs, tmp_path / "run", run__steps=1))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    path = os.pathsep.join(str(part) for part in (site, ROOT, ROOT / "tests"))
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "fire_megatron.train", "--recipe", str(recipe), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd or ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        timeout=180,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("arguments", [(), ("--check",)])
def test_the_distribution_of_pypi_is_refused(inputs, tmp_path, arguments):
    site = install(tmp_path / "site", "0.9.10.dev0", "lib", source="print('imported'); raise RuntimeError('no server')")
    code, output = run(inputs, tmp_path, site, *arguments)
    assert code == 2, output
    (line,) = output.splitlines()
    assert line.startswith(f"error: the distribution apex 0.9.10.dev0 in {site} is not NVIDIA's apex")
    assert "pip uninstall apex" in line and "https://github.com/NVIDIA/apex" in line
    assert not (tmp_path / "run").exists()


def test_on_every_rank(inputs, tmp_path):
    site = install(tmp_path / "site", "0.9.10.dev0")
    code, output = run(inputs, tmp_path, site, ranks=2)
    assert code != 0 and "exitcode  : 2" in output, output
    assert output.count("error: the distribution apex 0.9.10.dev0") == 1, "one rank speaks for all"


def test_nvidias_apex_passes_and_so_does_a_folder_of_that_name(inputs, tmp_path):
    """Neither is of any use on a CPU, and megatron-core is kept from both: each raises or passes for what it is not."""
    site = install(tmp_path / "site", "0.1", "multi_tensor_apply", "optimizers", source="raise SystemExit('imported')")
    code, output = run(inputs, tmp_path, site, "metrics.console=true")
    assert code == 0, output
    assert "apex                -: 0.1 installed, needs a GPU; torch kernels instead" in output

    (tmp_path / "stray" / "apex").mkdir(parents=True)
    again = tmp_path / "again"
    again.mkdir()
    code, output = run(inputs, again, again, cwd=tmp_path / "stray")
    assert code == 0, output
    assert f"not installed (a mere folder, {tmp_path / 'stray' / 'apex'}, is ignored)" in output
    losses = [read_metrics(folder / "run")[0]["loss"] for folder in (tmp_path, again)]
    assert losses[0] == losses[1]
