"""Conversion there and back: every tensor of every family, bit by bit, with all that lies beside the weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import FAMILIES, make_hf, save_hf, stacked_experts, write_tokenizer
from safetensors.torch import load_file, save_file

from fire_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf
from fire_megatron.checkpoint.torch_dist import ShardReader
from fire_megatron.config.checkpoints import read_marker

ROOT = Path(__file__).resolve().parents[3]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_equal(actual, expected):
    """Same names, dtypes, shapes and bits."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(actual[name].view(torch.uint8), tensor.view(torch.uint8)), name


def there_and_back(hf, tmp_path, **options):
    """Convert and export again."""
    megatron = hf_to_megatron(hf, tmp_path / "megatron", **options)
    return megatron_to_hf(megatron, tmp_path / "back")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_keeps_every_bit(family, dtype, read_weights, tmp_path):
    save_hf(family, tmp_path / "hf", dtype=DTYPES[dtype], num_hidden_layers=3)
    back = there_and_back(tmp_path / "hf", tmp_path)
    expected = read_weights(tmp_path / "hf")
    assert {tensor.dtype for tensor in expected.values()} == {DTYPES[dtype]}
    check_equal(read_weights(back), expected)


def test_stacked_experts_are_read_too(read_weights, tmp_path):
    """A folder with the experts as transformers has them in memory gives the same checkpoint."""
    model = save_hf("qwen3-moe", tmp_path / "published", num_hidden_layers=2)
    shutil.copytree(tmp_path / "published", tmp_path / "hf")
    stacked = stacked_experts(dict(model.named_parameters()))
    save_file({name: p.detach().clone() for name, p in stacked.items()}, tmp_path / "hf" / "model.safetensors")
    assert not read_weights(tmp_path / "hf").keys() >= read_weights(tmp_path / "published").keys()
    check_equal(read_weights(there_and_back(tmp_path / "hf", tmp_path)), read_weights(tmp_path / "published"))


def test_transformers_loads_the_export(tmp_path):
    """Also its embedding that is tied to the output layer, which the file holds once."""
    import transformers

    model = save_hf("llama3-tied", tmp_path / "hf", dtype=torch.bfloat16, num_hidden_layers=2)
    back = there_and_back(tmp_path / "hf", tmp_path)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(back, dtype="auto", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert loaded.dtype == torch.bfloat16, "as config.json says"
    tokens = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, model(tokens).logits)
    tokenizer = transformers.AutoTokenizer.from_pretrained(back)
    assert tokenizer("w17 w18")["input_ids"] == [17, 18]


def test_what_lies_beside_the_weights_is_carried_along(published, tmp_path):
    hf = tmp_path / "hf"
    shutil.copytree(published, hf)
    (hf / "LICENSE").write_text("Apache")
    (hf / "chat_template.jinja").write_text("{{ messages }}")
    (hf / "pytorch_model.bin").write_text("weights in another form")
    names = {path.name for path in hf.iterdir() if path.suffix not in (".safetensors", ".bin")}
    assert names >= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    megatron = hf_to_megatron(hf, tmp_path / "megatron")
    assert {path.name for path in megatron.iterdir()} == names | {"weights", "fire_checkpoint.json"}
    back = megatron_to_hf(megatron, tmp_path / "back")
    assert {path.name for path in back.iterdir()} == names | {"model.safetensors"}
    for name in names - {"config.json"}:
        assert (back / name).read_bytes() == (megatron / name).read_bytes() == (hf / name).read_bytes(), name
    assert json.loads((back / "config.json").read_text()) == json.loads((hf / "config.json").read_text())


def test_shards_in(read_weights, tmp_path):
    model = make_hf("qwen2", num_hidden_layers=3)
    model.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    write_tokenizer(tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) >= 4
    back = there_and_back(tmp_path / "hf", tmp_path)
    check_equal(read_weights(back), read_weights(tmp_path / "hf"))


def test_shards_out(published, read_weights, tmp_path):
    import transformers

    limit = 100_000
    megatron = hf_to_megatron(published, tmp_path / "megatron")
    back = megatron_to_hf(megatron, tmp_path / "back", shard_gb=limit / 1e9)
    files = sorted(path.name for path in back.glob("*.safetensors"))
    assert len(files) >= 4
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    expected = read_weights(published)
    check_equal(read_weights(back), expected)
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in expected.values())
    assert index["weight_map"] == {name: file for file in files for name in load_file(back / file)}
    for file in files:
        held = load_file(back / file)
        assert len(held) == 1 or sum(t.numel() * t.element_size() for t in held.values()) <= limit
    _, report = transformers.AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]


@pytest.mark.parametrize("step", ["there", "back"])
def test_dtype(step, published, read_weights, tmp_path):
    asked = {"dtype": "bfloat16"}
    megatron = hf_to_megatron(published, tmp_path / "megatron", **asked if step == "there" else {})
    stored = {tensor.dtype for tensor in ShardReader(megatron / "weights").tensors.values()}
    assert stored == {torch.bfloat16 if step == "there" else torch.float32}
    assert read_marker(megatron)["dtype"] == str(*stored).removeprefix("torch.")
    back = megatron_to_hf(megatron, tmp_path / "back", **asked if step == "back" else {})
    check_equal(read_weights(back), {name: t.bfloat16() for name, t in read_weights(published).items()})
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_old_exports_hold_besides_is_left_out(damaged, published, read_weights, tmp_path):
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    back = there_and_back(damaged(lambda weights: weights.update(buffers)), tmp_path)
    check_equal(read_weights(back), read_weights(published))


def test_a_second_copy_of_the_weights_is_not_read(published, read_weights, tmp_path):
    """Mistral's models come with ``consolidated.safetensors``, in other names."""
    hf = tmp_path / "hf"
    shutil.copytree(published, hf)
    save_file({"layers.0.attention.wq.weight": torch.ones(2, 2)}, hf / "consolidated.safetensors")
    check_equal(read_weights(there_and_back(hf, tmp_path)), read_weights(published))


def test_overwrite_replaces_the_whole_folder(published, read_weights, tmp_path):
    save_hf("llama", tmp_path / "old", seed=9, num_hidden_layers=3)
    for _ in range(2):  # the first time a different model, then the same
        hf_to_megatron(tmp_path / "old", tmp_path / "megatron", overwrite=True)
        hf_to_megatron(published, tmp_path / "megatron", overwrite=True)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", shard_gb=1e-4)
    back = megatron_to_hf(tmp_path / "megatron", tmp_path / "back", overwrite=True)
    assert len(list(back.glob("*.safetensors"))) == 1 and not (back / "model.safetensors.index.json").exists()
    check_equal(read_weights(back), read_weights(published))
    assert {path.name for path in tmp_path.iterdir()} == {"old", "megatron", "back"}


def test_leftovers_of_a_killed_conversion_do_not_get_in(published, tmp_path):
    """Containers give every conversion the same process id, which names its temporary folder."""
    leftover = tmp_path / f".tmp_megatron_{os.getpid()}"
    (leftover / "weights").mkdir(parents=True)
    (leftover / "weights" / "__0_7.distcp").write_text("from another model")
    megatron = hf_to_megatron(published, tmp_path / "megatron")
    assert {path.name for path in tmp_path.iterdir()} == {"megatron"}
    assert not (megatron / "weights" / "__0_7.distcp").exists()


def test_an_empty_folder_is_free(published, tmp_path):
    (tmp_path / "megatron").mkdir()
    assert read_marker(hf_to_megatron(published, tmp_path / "megatron"))["family"] == "llama"


def test_the_tool(published, read_weights, tmp_path):
    """As its users start it, by either name: exit code, what it prints, and no traceback."""

    def convert(*arguments, command=("-m", "fire_megatron", "convert")):
        line = [sys.executable, *command, *map(str, arguments)]
        return subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)

    there = convert("hf-to-megatron", "--hf", published, "--out", "megatron", "--dtype", "bfloat16")
    assert there.returncode == 0 and there.stdout.startswith("wrote megatron ("), there.stderr
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    check_equal(read_weights(tmp_path / "back"), {name: t.bfloat16() for name, t in read_weights(published).items()})
    tool = [str(ROOT / "tools/convert.py")]
    again = convert("megatron-to-hf", "--checkpoint", "megatron", "--out", "back", command=tool)
    assert again.returncode == 2 and again.stderr == "error: back: already holds a Hugging Face model; pass " + (
        "--overwrite to replace it\n"
    )
