"""Whatever is wrong with recipe, data, checkpoints or layout, a run ends with exit code 2 and a message that names the
key, the value and the fix; without a traceback, and on several ranks without a hang."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from models import VOCABULARY, save_megatron
from tiny_run import make_inputs, tiny_recipe, write_prompts, write_recipe

from fire_megatron.cli.train import main
from fire_megatron.fire import hooks


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Models and prompts that nothing is wrong with; not to be changed."""
    folder = make_inputs(tmp_path_factory.mktemp("bad"), num_hidden_layers=2)
    save_megatron("llama", folder / "small", num_hidden_layers=2, vocab_size=VOCABULARY - 1)
    return folder


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """The folder of a run of one step."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    recipe = write_recipe(run_dir.parent / "recipe.yaml", tiny_recipe(inputs, run_dir, run__steps=1))
    assert main(["--recipe", str(recipe)]) == 0
    return run_dir


@dataclasses.dataclass
class Box:
    """A run about to be spoilt: a good recipe, and a folder for spoilt copies."""

    inputs: Path
    folder: Path
    recipe: dict[str, Any]
    finished: Path | None = None
    overrides: tuple[str, ...] = ()
    names: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the expected message may refer to."""

    def copy(self, role: str) -> Path:
        """A copy of the checkpoint of ``student``, ``math`` or ``code``, put in its place in the recipe."""
        target = Path(shutil.copytree(self.inputs / role, self.folder / role))
        self.section(role)["checkpoint"] = str(target)
        return target

    def section(self, role: str) -> dict[str, Any]:
        """The role's part of the recipe."""
        return self.recipe["student"] if role == "student" else self.recipe["teachers"][role]

    def prompts(self, content: str | bytes) -> Path:
        """A prompt file, the only one of the recipe."""
        path = self.folder / "prompts.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        self.recipe["data"]["train"] = [{"path": str(path)}]
        return path

    def resume(self) -> Path:
        """Let the run continue a finished one; returns its checkpoint."""
        run_dir = Path(shutil.copytree(self.finished, self.folder / "run"))
        self.recipe["run"] |= {"dir": str(run_dir), "steps": 2}
        return run_dir / "checkpoints" / "step_000001"


def change_json(path: Path, **values: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def only(folder: Path, pattern: str) -> Path:
    """The one file of that kind."""
    (path,) = folder.glob(pattern)
    return path


CASES: dict[str, tuple[Callable[[Box], Any], tuple[str, ...], bool]] = {}
"""Name -> what spoils the run, what the message says, whether the run's fixture of a finished run is needed."""


def case(*says: str, resumes: bool = False) -> Callable:
    """Register a case; in ``says`` a name in braces stands for what the case left in ``Box.names``."""

    def add(spoil: Callable[[Box], Any]) -> Callable[[Box], Any]:
        CASES[spoil.__name__] = (spoil, says, resumes)
        return spoil

    return add


# ---- recipe -------------------------------------------------------------------------------------------------------


@case("2 problems", "run.steps", "optimizer.lr")
def several_problems_at_once(box):
    box.overrides = ("run.steps=0", "optimizer.lr=-1")


@case("student.parallel.tensor: 3 does not divide the model's 4 heads nor its 2 key/value heads")
def layout_that_does_not_fit(box):
    box.recipe["student"]["parallel"] = {"tensor": 3}


@case("loss.hooks.0.name", "'mine'", "run.plugins")
def hook_that_no_plugin_registers(box):
    box.recipe["run"]["plugins"] = ["json"]
    box.recipe["loss"] = {"hooks": [{"name": "mine"}]}


@case("run.plugins", "'no_such_module'", "PYTHONPATH")
def plugin_missing(box):
    box.recipe["run"]["plugins"] = ["no_such_module"]


@case("rollout.stop_tokens", "'w7 w8'", "2 tokens", "must be one")
def stop_token_of_two(box):
    box.recipe["rollout"]["stop_tokens"] = ["w7 w8"]


# ---- labels and prompts -------------------------------------------------------------------------------------------


@case("{path}:3", "'physics'", "code, math")
def row_label_without_teacher(box):
    rows = [{"problem": "w7", "label": label} for label in ("math", "code", "physics")]
    box.names["path"] = box.prompts("\n".join(map(json.dumps, rows)))


@case("{path}", "no prompt", "data.max_prompt_tokens=16", "raise it")
def no_prompt_left(box):
    box.names["path"] = box.prompts(json.dumps({"problem": "w7 " * 20, "label": "math"}))


@case("data.system_prompt", "chat template")
def system_prompt_without_template(box):
    box.recipe["data"]["system_prompt"] = "Be brief."


# ---- checkpoints --------------------------------------------------------------------------------------------------


@case("teachers.math.checkpoint", "Hugging Face folder", "fire-megatron convert hf-to-megatron --hf {hf}")
def checkpoint_not_converted(box):
    source = box.inputs / "math-hf"
    box.names["hf"] = box.folder / "hf-model"
    shutil.copytree(source, box.names["hf"])
    box.recipe["teachers"]["math"]["checkpoint"] = str(box.names["hf"])


@case("damaged checkpoint", "{file} is cut short", "copy it again")
def weights_cut_short(box):
    box.names["file"] = only(box.copy("math"), "weights/*.distcp")
    content = box.names["file"].read_bytes()
    box.names["file"].write_bytes(content[: len(content) // 2])


@case("damaged checkpoint", "{file} is missing")
def weights_file_missing(box):
    box.names["file"] = only(box.copy("math"), "weights/*.distcp")
    box.names["file"].unlink()


@case("{file}", "damaged", "copy the checkpoint again")
def weights_overwritten(box):
    box.names["file"] = only(box.copy("math"), "weights/*.distcp")
    box.names["file"].write_bytes(bytes(box.names["file"].stat().st_size))


@case("{folder}", "1 tensors are missing", "decoder.final_layernorm.weight", "config.json")
def tensor_missing(box):
    box.names["folder"] = box.copy("student")
    path = box.names["folder"] / "weights" / ".metadata"
    path.with_name("checksums.json").unlink()  # as of a folder from elsewhere
    metadata = pickle.loads(path.read_bytes())
    del metadata.state_dict_metadata["decoder.final_layernorm.weight"]
    path.write_bytes(pickle.dumps(metadata))


@case("{file}", "damaged")
def metadata_damaged(box):
    box.names["file"] = box.copy("student") / "weights" / ".metadata"
    box.names["file"].write_bytes(box.names["file"].read_bytes()[:100])


class _Command:
    def __reduce__(self):
        return print, ("this must not run",)


@case("{file}", "cannot be read", "refuses builtins.print")
def metadata_that_runs_code(box):
    box.names["file"] = box.copy("student") / "weights" / ".metadata"
    box.names["file"].with_name("checksums.json").unlink()
    box.names["file"].write_bytes(pickle.dumps(_Command()))


@case(
    "{folder}",
    "linear_fc1.weight has shape (192, 64)",
    "the model needs (256, 64)",
    "does config.json belong to these weights?",
)
def config_of_another_width(box):
    box.names["folder"] = box.copy("student")
    change_json(box.names["folder"] / "config.json", intermediate_size=128)


@case("{folder}", "tensors are missing", "decoder.layers.2", "does config.json belong to these weights?")
def config_of_more_layers(box):
    box.names["folder"] = box.copy("code")
    change_json(box.names["folder"] / "config.json", num_hidden_layers=3)


@case("teachers.code.checkpoint", "vocabulary of 300", f"tokenizer's {VOCABULARY} tokens")
def vocabulary_smaller_than_the_tokenizer(box):
    box.section("code")["checkpoint"] = str(box.inputs / "small")


@case("loss.estimator", "topk takes one teacher a row", "1 rows", "code+math", "use full")
def mixture_with_topk(box):
    box.recipe["loss"] = {"estimator": "topk"}
    box.prompts(json.dumps({"problem": "w7", "label": {"math": 1, "code": 3}}))


@case("teachers.code.checkpoint", "tokenizer differs from the student's")
def tokenizers_differ(box):
    path = box.copy("code") / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["w7"], vocabulary["w8"] = vocabulary["w8"], vocabulary["w7"]
    path.write_text(json.dumps(tokenizer))


@case("{folder}", "no tokenizer", "tokenizer.json")
def tokenizer_missing(box):
    box.names["folder"] = box.copy("code")
    for path in box.names["folder"].glob("tokenizer*"):
        path.unlink()


# ---- megatron-core ------------------------------------------------------------------------------------------------


@case("student.megatron.recompute_granularty", "no such field", "did you mean 'recompute_granularity'?")
def unknown_megatron_field(box):
    box.recipe["student"]["megatron"] = {"recompute_granularty": "full"}


@case("student.megatron.recompute_granularity", "'everything'", "'full'")
def megatron_field_of_wrong_type(box):
    box.recipe["student"]["megatron"] = {"recompute_granularity": "everything"}


@case("student", "megatron-core rejects", "fp4_param must be used together with fp4")
def megatron_field_rejected(box):
    box.recipe["student"] |= {"megatron": {"fp4_param": True}, "megatron_untested": True}


@case("student.megatron", "cannot build the model", "cpu_offloading")
def megatron_field_that_needs_a_gpu(box):
    box.recipe["student"] |= {"megatron": {"cpu_offloading": True}, "megatron_untested": True}


# ---- resuming -----------------------------------------------------------------------------------------------------


@case("run.resume is 'never'", "already holds a run", "choose another run.dir", resumes=True)
def resume_never_on_a_run(box):
    box.resume()
    box.recipe["run"]["resume"] = "never"


@case("run.resume is 'must'", "holds no complete checkpoint", "'auto'")
def resume_must_without_a_run(box):
    box.recipe["run"]["resume"] = "must"


@case("rollout.prompts_per_step", "with 4, and is now 3", "{checkpoint}", "new run.dir", resumes=True)
def resumed_with_another_order(box):
    box.names["checkpoint"] = box.resume()
    box.recipe["rollout"]["prompts_per_step"] = 3


@case("data.train", "other prompts", "{checkpoint}", "new run.dir", resumes=True)
def resumed_with_other_prompts(box):
    box.names["checkpoint"] = box.resume()
    path = write_prompts(box.folder / "math.jsonl", "math", 6, seed=9)
    box.recipe["data"]["train"][0]["path"] = str(path)


@case("{file} is cut short", "none of the checkpoints", resumes=True)
def resumed_from_a_damaged_checkpoint(box):
    box.names["checkpoint"] = box.resume()
    box.names["file"] = only(box.names["checkpoint"], "weights/*.distcp")
    box.names["file"].write_bytes(box.names["file"].read_bytes()[:-5000])


@case("{checkpoint}", "optimizer.exp_avg", "student.checkpoint of another run.dir", resumes=True)
def resumed_from_weights_alone(box):
    box.names["checkpoint"] = box.resume()
    shutil.rmtree(box.names["checkpoint"])
    shutil.copytree(box.inputs / "student", box.names["checkpoint"])


@case("{checkpoint}/weights/common.pt: damaged", "another run.dir", resumes=True)
def resumed_without_common_values(box):
    box.names["checkpoint"] = box.resume()
    (box.names["checkpoint"] / "weights" / "common.pt").write_bytes(b"")


@pytest.mark.parametrize("name", CASES)
def test_message_and_exit_code(name, inputs, tmp_path, capfd, request):
    spoil, says, resumes = CASES[name]
    finished = request.getfixturevalue("finished") if resumes else None
    box = Box(inputs, tmp_path, tiny_recipe(inputs, tmp_path / "run"), finished)
    spoil(box)
    capfd.readouterr()
    path = write_recipe(tmp_path / "recipe.yaml", box.recipe)
    code = main(["--recipe", str(path), *box.overrides])
    output, errors = capfd.readouterr()
    assert code == 2, output + errors
    assert errors.startswith("error: "), errors
    assert "Traceback" not in errors + output and "this must not run" not in output
    for text in says:
        assert text.format(**box.names) in errors, errors


def test_scope_of_a_hook_of_ones_own(inputs, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(hooks._REGISTRY, "mine", lambda: Mock(scope="microbatch", reasons=()))
    values = tiny_recipe(inputs, tmp_path / "run", run__plugins=["json"], optimizer__micro_batch_tokens=64)
    recipe = write_recipe(tmp_path / "recipe.yaml", values | {"loss": {"hooks": [{"name": "mine"}]}})
    assert main(["--recipe", str(recipe)]) == 2
    assert "loss.hooks.0: the scope of mine, 'microbatch', takes its statistics" in capfd.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_cuda_without_a_gpu(inputs, tmp_path, capfd):
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_recipe(inputs, tmp_path / "run", run__device="cuda"))
    assert main(["--recipe", str(recipe)]) == 2
    assert "run.device" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "one"}, "environment variable RANK='one' is not a whole number"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "MASTER_ADDR"),
    ],
)
def test_launcher(variables, says, inputs, tmp_path, capfd, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_recipe(inputs, tmp_path / "run"))
    assert main(["--recipe", str(recipe)]) == 2
    assert says in capfd.readouterr().err


def test_check_finds_no_problem_in_the_good_recipe(inputs, tmp_path, capfd):
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_recipe(inputs, tmp_path / "run"))
    assert main(["--recipe", str(recipe), "--check"]) == 0
    assert "no problem" in capfd.readouterr().out


@pytest.mark.parametrize("name", ["tensor_missing", "label_in_a_row_without_a_teacher", "misspelt"])
def test_check_looks_as_deep_as_a_run(inputs, tmp_path, capfd, name):
    values = tiny_recipe(inputs, tmp_path / "run")
    if name == "tensor_missing":
        shutil.copytree(inputs / "math", tmp_path / "math")
        only(tmp_path / "math", "weights/*.distcp").write_bytes(b"")
        values["teachers"]["math"]["checkpoint"], says = str(tmp_path / "math"), "teachers.math: "
    elif name == "misspelt":
        values["student"]["megatron"], says = {"recompute_granulariti": "full"}, "did you mean 'recompute_granularity'"
    else:
        (tmp_path / "rows.jsonl").write_text('{"problem": "w7", "label": "physics"}\n')
        values["data"]["train"][0]["path"], says = str(tmp_path / "rows.jsonl"), "label 'physics' has no teacher"
    recipe = write_recipe(tmp_path / "recipe.yaml", values)
    assert main(["--recipe", str(recipe), "--check"]) == 2
    assert says in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
