"""An ``apex`` that is not NVIDIA's ends a run with exit code 2 on every rank, before megatron-core would import it."""

from __future__ import annotations

from pathlib import Path
from subprocess import STDOUT

from processes import ROOT, TRAIN, call, environment
from tiny_run import read_metrics, tiny_recipe, write_recipe


def install(site: Path, version: str, *modules: str, source: str = "") -> Path:
    """A distribution of that name, as pip leaves it."""
    info = site / f"apex-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: apex\nVersion: {version}\n")
    for module in ("", *modules):
        (site / "apex" / module).mkdir(parents=True, exist_ok=True)
        (site / "apex" / module / "__init__.py").write_text("" if module else source)
    return site


def run(tiny, tmp_path, site, *arguments, code=0, ranks=1, cwd=ROOT):
    """Output of the training command, which must end with ``code``, with ``site`` on the path."""
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_recipe(tiny, tmp_path / "run", run__steps=1))
    return call(*TRAIN, recipe, *arguments, ranks=ranks, code=code, cwd=cwd, env=environment(site), stderr=STDOUT)


def test_the_distribution_of_pypi_is_refused(tiny, tmp_path):
    site = install(tmp_path / "site", "0.9.10.dev0", "lib", source="print('imported'); raise RuntimeError('no server')")
    output = run(tiny, tmp_path, site, "--check", code=2)
    (line,) = output.splitlines()
    assert line.startswith(f"error: the distribution apex 0.9.10.dev0 in {site} is not NVIDIA's apex")
    assert "pip uninstall apex" in line and "https://github.com/NVIDIA/apex" in line
    assert not (tmp_path / "run").exists()


def test_on_every_rank(tiny, tmp_path):
    site = install(tmp_path / "site", "0.9.10.dev0")
    output = run(tiny, tmp_path, site, ranks=2, code=1)
    assert "exitcode  : 2" in output, output
    assert output.count("error: the distribution apex 0.9.10.dev0") == 1, "one rank speaks for all"


def test_nvidias_apex_passes_and_so_does_a_folder_of_that_name(tiny, tmp_path):
    """Neither is of any use on a CPU, and megatron-core is kept from both: each raises or passes for what it is not."""
    site = install(tmp_path / "site", "0.1", "multi_tensor_apply", "optimizers", source="raise SystemExit('imported')")
    output = run(tiny, tmp_path, site, "metrics.console=true")
    assert "apex                -: 0.1 installed, needs a GPU; torch kernels instead" in output

    (tmp_path / "stray" / "apex").mkdir(parents=True)
    again = tmp_path / "again"
    again.mkdir()
    output = run(tiny, again, again, cwd=tmp_path / "stray")
    assert f"not installed (a mere folder, {tmp_path / 'stray' / 'apex'}, is ignored)" in output
    losses = [read_metrics(folder / "run")[0]["loss"] for folder in (tmp_path, again)]
    assert losses[0] == losses[1]
