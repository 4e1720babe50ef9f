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

import pytest
import torch
from models import VOCABULARY, save_megatron
from tiny_run import make_inputs, tiny_recipe, write_prompts, write_recipe

from fire_megatron.cli.train import main


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
    recipe_path: Path | None = None
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


@case("optimizer.lrr", "did you mean optimizer.lr?")
def unknown_key(box):
    box.recipe["optimizer"] = {"lrr": 1e-3}


@case("run.steps", "'many'", "whole number")
def wrong_type(box):
    box.recipe["run"]["steps"] = "many"


@case("rollout.top_p", "1.5", "at most 1")
def out_of_range(box):
    box.recipe["rollout"]["top_p"] = 1.5


@case("data", "missing")
def section_missing(box):
    del box.recipe["data"]


@case("2 problems", "run.steps", "optimizer.lr")
def several_problems_at_once(box):
    box.overrides = ("run.steps=0", "optimizer.lr=-1")


@case("run.steps", "key=value")
def override_without_value(box):
    box.overrides = ("run.steps",)


@case("override", "student.paralel:", "did you mean student.parallel?")
def override_of_unknown_key(box):
    box.overrides = ("student.paralel.tensor=2",)


@case("{recipe}:3", "expected ',' or ']'")
def yaml_syntax(box):
    box.recipe_path = box.names["recipe"] = box.folder / "broken.yaml"
    box.recipe_path.write_text("run:\n  steps: [1, 2\nstudent: {}\n")


@case("no such recipe file", "did you mean {recipe}?")
def recipe_file_missing(box):
    box.names["recipe"] = write_recipe(box.folder / "recipe.yaml", box.recipe)
    box.recipe_path = box.folder / "recipes.yaml"


@case("loss.hooks.0.name", "'filtre'", "did you mean filter?", "run.plugins")
def unknown_hook(box):
    box.recipe["loss"] = {"hooks": [{"name": "filtre"}]}


@case("loss.hooks.0.name", "'mine'", "run.plugins")
def hook_that_no_plugin_registers(box):
    box.recipe["run"]["plugins"] = ["json"]
    box.recipe["loss"] = {"hooks": [{"name": "mine"}]}


@case("percentil", "percentile")
def unknown_hook_option(box):
    box.recipe["loss"] = {"hooks": [{"name": "filter", "percentil": 3}]}


@case("run.plugins", "'no_such_module'", "PYTHONPATH")
def plugin_missing(box):
    box.recipe["run"]["plugins"] = ["no_such_module"]


@case("rollout.stop_tokens", "'w7 w8'", "2 tokens", "must be one")
def stop_token_of_two(box):
    box.recipe["rollout"]["stop_tokens"] = ["w7 w8"]


@case("run.dir", "{file} is a file", "choose another folder")
def run_dir_is_a_file(box):
    box.names["file"] = box.folder / "occupied"
    box.names["file"].write_text("")
    box.recipe["run"]["dir"] = str(box.names["file"])


@case("rollout.max_new_tokens", "600", "512", "data.max_prompt_tokens", "lower one")
def beyond_the_models_positions(box):
    box.recipe["rollout"]["max_new_tokens"] = 600


@case("evaluation.every", "evaluation.prompts")
def evaluation_without_prompts(box):
    box.recipe["evaluation"] = {"every": 2}


@case("student.layer_spec", "te needs CUDA", "local")
def transformer_engine_on_cpu(box):
    box.recipe["student"]["layer_spec"] = "te"


# ---- labels and prompts -------------------------------------------------------------------------------------------


@case("data.train.0.label", "'maths'", "did you mean math?")
def source_label_without_teacher(box):
    box.recipe["data"]["train"][0]["label"] = "maths"


@case("{path}:3", "'physics'", "code, math")
def row_label_without_teacher(box):
    rows = [{"problem": "w7", "label": label} for label in ("math", "code", "physics")]
    box.names["path"] = box.prompts("\n".join(map(json.dumps, rows)))


@case("{path}:1", "'label' is missing", "data.label_key")
def row_without_label(box):
    box.names["path"] = box.prompts('{"problem": "w7"}')


@case("teachers.math.labels", "'code'", "teachers.code", "one teacher")
def two_teachers_with_one_label(box):
    box.recipe["teachers"]["math"]["labels"] = ["math", "code"]


@case("data.train.0.path", "absent.jsonl does not exist", "correct the path")
def prompt_file_missing(box):
    box.recipe["data"]["train"][0]["path"] = "absent.jsonl"


@case("{path}:2", "not valid JSON", "one object a line")
def prompt_line_not_json(box):
    box.names["path"] = box.prompts('{"problem": "w7", "label": "math"}\n{"problem": \n')


@case("{path}:1", "'problem'", "data.prompt_key", "question, label")
def prompt_key_missing(box):
    box.names["path"] = box.prompts('{"question": "w7", "label": "math"}')


@case("{path}:1", "not UTF-8", "save the file as UTF-8")
def prompts_not_utf8(box):
    box.names["path"] = box.prompts('{"problem": "caf\xe9", "label": "math"}'.encode("latin-1"))


@case("{path}:1", "'problem' is empty", "remove the row")
def prompt_empty(box):
    box.names["path"] = box.prompts('{"problem": " ", "label": "math"}')


@case("{path}:1", "20 tokens", "data.max_prompt_tokens=16", "data.too_long")
def prompt_too_long(box):
    box.recipe["data"]["too_long"] = "error"
    box.names["path"] = box.prompts(json.dumps({"problem": "w7 " * 20, "label": "math"}))


@case("{path}", "no prompt", "data.max_prompt_tokens=16", "raise it")
def no_prompt_left(box):
    box.names["path"] = box.prompts(json.dumps({"problem": "w7 " * 20, "label": "math"}))


@case("data.system_prompt", "chat template")
def system_prompt_without_template(box):
    box.recipe["data"]["system_prompt"] = "Be brief."


# ---- checkpoints --------------------------------------------------------------------------------------------------


@case("student.checkpoint", "absent does not exist", "convert")
def checkpoint_missing(box):
    box.recipe["student"]["checkpoint"] = "absent"


@case("teachers.math.checkpoint", "Hugging Face folder", "fire-megatron convert hf-to-megatron --hf {hf}")
def checkpoint_not_converted(box):
    source = box.inputs / "math-hf"
    box.names["hf"] = box.folder / "hf-model"
    shutil.copytree(source, box.names["hf"])
    box.recipe["teachers"]["math"]["checkpoint"] = str(box.names["hf"])


@case("student.checkpoint", "several checkpoints", "step_000001", resumes=True)
def folder_of_checkpoints(box):
    box.recipe["student"]["checkpoint"] = str(box.finished / "checkpoints")


@case("teachers.code.checkpoint", "not a complete checkpoint", "fire_checkpoint.json")
def checkpoint_without_marker(box):
    (box.copy("code") / "fire_checkpoint.json").unlink()


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
    "config.json says (256, 64)",
    "does config.json belong to these weights?",
)
def config_of_another_width(box):
    box.names["folder"] = box.copy("student")
    change_json(box.names["folder"] / "config.json", intermediate_size=128)


@case("{folder}", "tensors are missing", "decoder.layers.2", "does config.json belong to these weights?")
def config_of_more_layers(box):
    box.names["folder"] = box.copy("code")
    change_json(box.names["folder"] / "config.json", num_hidden_layers=3)


@case("{folder}/config.json", "model_type is 'mamba'", "supported: llama")
def unknown_family(box):
    box.names["folder"] = box.copy("code")
    change_json(box.names["folder"] / "config.json", model_type="mamba")


@case("teachers.code.checkpoint", "vocabulary of 300", f"tokenizer's {VOCABULARY} tokens", "share one")
def vocabulary_smaller_than_the_tokenizer(box):
    box.section("code")["checkpoint"] = str(box.inputs / "small")


@case("loss.top_k", "302 exceeds the vocabulary of 301")
def more_top_k_than_vocabulary(box):
    box.recipe["loss"] = {"estimator": "topk", "top_k": 302}


@case("loss.estimator", "topk takes one teacher a row", "1 of 1", "code+math", "use full")
def mixture_with_topk(box):
    box.recipe["loss"] = {"estimator": "topk"}
    box.prompts(json.dumps({"problem": "w7", "label": {"math": 1, "code": 3}}))


@case("loss.student_temperature", "no effect with estimator sampled", "use full or topk")
def temperature_of_sampled(box):
    box.recipe["loss"] = {"student_temperature": 2.0}


@case("loss.divergence", "no effect with estimator sampled", "use full or topk")
def divergence_of_sampled(box):
    box.recipe["loss"] = {"divergence": "forward_kl"}


@case("loss.skew", "no effect with divergence reverse_kl", "use skewed_forward_kl or skewed_reverse_kl")
def skew_of_another_divergence(box):
    box.recipe["loss"] = {"estimator": "full", "skew": 0.2}


@case("loss.clip", "no effect with estimator full", "use sampled")
def clip_of_full(box):
    box.recipe["loss"] = {"estimator": "full", "clip": 0.3}


@case("loss.divergence", "'kl'", "one of reverse_kl, forward_kl")
def unknown_divergence(box):
    box.recipe["loss"] = {"estimator": "full", "divergence": "kl"}


@case("loss.beta", "1.0 is not allowed", "above 0 and below 1")
def beta_at_its_limit(box):
    box.recipe["loss"] = {"estimator": "full", "divergence": "jensen_shannon", "beta": 1.0}


@case("prompts.jsonl:1", "label 'cod' has no teacher")
def mixture_of_a_label_without_a_teacher(box):
    box.prompts(json.dumps({"problem": "w7", "label": {"math": 1, "cod": 3}}))


@case("prompts.jsonl:1", "'label.math' is -1", "number of at least 0")
def mixture_with_a_negative_weight(box):
    box.prompts(json.dumps({"problem": "w7", "label": {"math": -1, "code": 3}}))


@case("prompts.jsonl:1", "at least one label needs a weight above 0")
def mixture_of_nothing(box):
    box.prompts(json.dumps({"problem": "w7", "label": {"math": 0}}))


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


# ---- layout -------------------------------------------------------------------------------------------------------


@case("student.parallel.tensor", "3 does not divide", "4 heads", "2 key/value heads")
def tensor_parallel_over_heads(box):
    box.recipe["student"]["parallel"] = {"tensor": 3}


@case("teachers.math.parallel", "tensor 2 x pipeline 1 x context 1 = 2 ranks", "does not divide the run's 1")
def too_few_ranks(box):
    box.recipe["teachers"]["math"]["parallel"] = {"tensor": 2}


@case("student.parallel.pipeline", "5 stages for a model of 2 layers", "lower it")
def pipeline_over_layers(box):
    box.recipe["student"]["parallel"] = {"pipeline": 5}


@case("student.megatron.recompute_granularty", "no such field", "did you mean 'recompute_granularity'?")
def unknown_megatron_field(box):
    box.recipe["student"]["megatron"] = {"recompute_granularty": "full"}


@case("teachers.math.megatron.hidden_size", "set by teachers.math.checkpoint", "remove it")
def megatron_field_set_elsewhere(box):
    box.recipe["teachers"]["math"]["megatron"] = {"hidden_size": 128}


@case("student.megatron.recompute_granularity", "'everything'", "'full'")
def megatron_field_of_wrong_type(box):
    box.recipe["student"]["megatron"] = {"recompute_granularity": "everything"}


@case("student", "megatron-core rejects", "recompute_method")
def megatron_field_rejected(box):
    box.recipe["student"]["megatron"] = {"recompute_granularity": "full"}


@case("student.megatron", "cannot build the model", "gradient_accumulation_fusion")
def megatron_field_that_needs_a_gpu(box):
    box.recipe["student"]["megatron"] = {"gradient_accumulation_fusion": True}


@case("student.megatron.calculate_per_token_loss", "relies on its own value", "remove it")
def megatron_field_relied_on(box):
    box.recipe["student"]["megatron"] = {"calculate_per_token_loss": False}


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
    capfd.readouterr()
    spoil(box)
    path = box.recipe_path or write_recipe(tmp_path / "recipe.yaml", box.recipe)
    code = main(["--recipe", str(path), *box.overrides])
    output, errors = capfd.readouterr()
    assert code == 2, output + errors
    assert errors.startswith("error: "), errors
    assert "Traceback" not in errors + output and "this must not run" not in output
    for text in says:
        assert text.format(**box.names) in errors, errors


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
