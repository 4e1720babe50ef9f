"""Hugging Face folders as users have them: what transformers would load is converted, and the rest is named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from models import make_hf, save_hf, stacked_experts, write_tokenizer
from safetensors.torch import load_file, save_file

from fire_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf
from fire_megatron.config.checkpoints import checkpoint_problem
from fire_megatron.config.errors import CheckpointError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def there_and_back(hf, tmp_path, **options):
    """Convert and export again."""
    out = hf_to_megatron(hf, tmp_path / "megatron", overwrite=True, **options)
    return megatron_to_hf(out, tmp_path / "back", overwrite=True)


def logits(folder):
    """What transformers makes of a folder."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(torch.arange(6, 40)[None]).logits


def change(folder, weights=None, **config):
    """Change a folder's tensors, by a function of them, and its config.json; None takes a key out."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors = (weights and weights(tensors)) or tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return folder


def refusal(folder, tmp_path):
    """What conversion says."""
    with pytest.raises(CheckpointError) as error:
        hf_to_megatron(folder, tmp_path / "megatron")
    assert str(folder) in str(error.value)
    return str(error.value)


def test_the_single_file_goes_before_an_index(damaged, tmp_path):
    """Such as the index of a model of which the folder held the weights before."""
    hf = damaged()
    make_hf("llama", num_hidden_layers=2, seed=9).save_pretrained(tmp_path / "old", max_shard_size="100KB")
    for path in tmp_path.joinpath("old").glob("model*"):
        shutil.copy(path, hf)
    assert len(list(hf.glob("*.safetensors"))) > 3 and (hf / "model.safetensors.index.json").exists()
    assert torch.equal(logits(there_and_back(hf, tmp_path)), logits(hf))


def test_two_files_with_the_same_tensors_are_refused(damaged, tmp_path):
    """Without an index nothing says which of two variants is meant."""
    hf = damaged()
    shutil.copy(hf / "model.safetensors", hf / "model.fp16.safetensors")
    (hf / "model.safetensors").rename(hf / "model.fp32.safetensors")
    said = refusal(hf, tmp_path)
    assert "is in model.fp16.safetensors and in model.fp32.safetensors; leave the weights of one model" in said


def test_a_head_that_equals_the_embedding_is_dropped(damaged, tmp_path):
    hf = damaged(lambda w: w.update({HEAD: w[EMBEDDING].clone()}), tie_word_embeddings=True)
    back = there_and_back(hf, tmp_path)
    assert HEAD not in load_file(back / "model.safetensors")
    assert torch.equal(logits(back), logits(hf))


@pytest.mark.parametrize("kind", ["values", "one bit", "rows"])
def test_a_head_that_is_not_the_embedding_is_refused_with_two_ways_out(damaged, tmp_path, kind):
    def head(weights):
        if kind == "one bit":
            weights[HEAD] = weights[EMBEDDING].clone()
            weights[HEAD][300, 63] *= 1.0 + 2**-23
        elif kind == "rows":
            weights[HEAD] = weights[EMBEDDING][:300].clone()

    hf = damaged(head, tie_word_embeddings=True)
    said = refusal(hf, tmp_path)
    assert "tie_word_embeddings to false" in said and f"take {HEAD} out of the weights" in said
    if kind != "rows":
        change(hf, tie_word_embeddings=False)
        assert torch.equal(logits(there_and_back(hf, tmp_path)), logits(hf))
    change(hf, lambda w: {name: tensor for name, tensor in w.items() if name != HEAD}, tie_word_embeddings=True)
    assert torch.equal(logits(there_and_back(hf, tmp_path)), logits(hf))


@pytest.mark.parametrize(
    ("rename", "named"),
    [
        (lambda name: f"_orig_mod.{name}", "`_orig_mod.`"),
        (lambda name: f"module.{name}", "`module.`"),
        (lambda name: f"module._orig_mod.{name}", "`_orig_mod.` and `module.`"),
        (lambda name: name.replace("layers.0.", "layers.0._orig_mod."), "`_orig_mod.`"),
        (lambda name: name.replace("model.", "model._fsdp_wrapped_module."), "`_fsdp_wrapped_module.`"),
        (lambda name: name.replace("self_attn.", "self_attn._checkpoint_wrapped_module."), "`_checkpoint_wrapped_"),
        (lambda name: f"actor.{name}", "`actor.`"),
    ],
)
def test_names_with_a_wrapper_are_told(damaged, tmp_path, rename, named):
    hf = damaged()
    change(hf, lambda weights: {rename(name): tensor for name, tensor in weights.items()})
    said = refusal(hf, tmp_path)
    assert f"carry {named}" in said and "save the model inside" in said


@pytest.mark.parametrize("family", ["llama", "llama3-tied"])
def test_a_base_model_without_its_head(tmp_path, family):
    import transformers

    model = save_hf(family, tmp_path / "whole", num_hidden_layers=2)
    model.model.save_pretrained(tmp_path / "hf")
    said = refusal(tmp_path / "hf", tmp_path)
    assert "base model without its head" in said and "AutoModelForCausalLM" in said
    assert (HEAD in said) == (family == "llama")
    if family == "llama3-tied":  # what the message advises
        whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        whole.save_pretrained(tmp_path / "saved")
        assert torch.equal(logits(there_and_back(tmp_path / "saved", tmp_path)), logits(tmp_path / "whole"))


@pytest.mark.parametrize("other", [None, "score.weight"])
def test_another_head_or_none(damaged, tmp_path, other):
    def behead(weights):
        head = weights.pop(HEAD)
        if other:
            weights[other] = head[:2]

    said = refusal(damaged(behead), tmp_path)
    assert f"{HEAD} is missing" in said and "tie_word_embeddings to true" in said
    assert (f"there is {other}" in said) == bool(other)


@pytest.mark.parametrize("place", ["alone", "beside a model", "in place of its weights"])
def test_adapters(damaged, tmp_path, place):
    hf = damaged()
    (hf / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen3-8B"}))
    if place == "alone":
        (hf / "config.json").unlink()
        (hf / "model.safetensors").rename(hf / "adapter_model.safetensors")
    for said in (refusal(hf, tmp_path), checkpoint_problem(hf)):
        assert "PEFT adapter" in said and "Qwen/Qwen3-8B" in said and "merge_and_unload" in said
    if place == "in place of its weights":
        (hf / "adapter_config.json").unlink()
        change(hf, lambda w: {f"base_model.model.model.layers.{i}.q_proj.lora_A.weight": torch.ones(2) for i in "01"})
        assert "LoRA adapter" in refusal(hf, tmp_path) and "merge_and_unload" in refusal(hf, tmp_path)


def test_templates_of_other_names_are_carried_along(published, tmp_path):
    hf = tmp_path / "hf"
    shutil.copytree(published, hf)
    (hf / "additional_chat_templates").mkdir()
    (hf / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    back = there_and_back(hf, tmp_path)
    for folder in (tmp_path / "megatron", back):
        assert (folder / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"


@pytest.mark.parametrize("keys", [("dtype",), ("torch_dtype",), ("dtype", "torch_dtype"), ()])
def test_every_dtype_key_says_what_was_written(damaged, tmp_path, keys):
    names = dict.fromkeys(("dtype", "torch_dtype")) | dict.fromkeys(keys, "float32")
    hf = damaged()
    change(hf, **names)
    megatron = hf_to_megatron(hf, tmp_path / "megatron")
    for told, written in ((None, "float32"), ("bfloat16", "bfloat16")):
        back = megatron_to_hf(megatron, tmp_path / "back", dtype=told, overwrite=True)
        config = json.loads((back / "config.json").read_text())
        found = {key: config[key] for key in ("dtype", "torch_dtype") if key in config}
        assert found == dict.fromkeys(keys or ("dtype",), written)


def test_each_tensor_keeps_its_dtype(damaged, tmp_path):
    """Norms in float32 beside bfloat16, and one of the three that become one tensor."""
    wide = ("norm.weight", "layers.1.self_attn.k_proj.weight")

    def narrow(weights):
        weights |= {name: t if name.endswith(wide) else t.bfloat16() for name, t in weights.items()}

    hf = damaged(narrow, dtype="bfloat16")
    back, expected = load_file(there_and_back(hf, tmp_path) / "model.safetensors"), load_file(hf / "model.safetensors")
    assert {name: t.dtype for name, t in back.items()} == {name: t.dtype for name, t in expected.items()}
    assert all(torch.equal(back[name], tensor) for name, tensor in expected.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_wider_conversion_is_exported_as_wide(damaged, tmp_path):
    hf = damaged(lambda weights: weights.update({name: tensor.half() for name, tensor in weights.items()}))
    for told, written in ((None, torch.float16), ("float32", torch.float32)):
        back = load_file(there_and_back(hf, tmp_path, dtype=told) / "model.safetensors")
        assert {tensor.dtype for tensor in back.values()} == {written}


def quantise(weights, block):
    """The projections as FP8 releases have them: E4M3, and what each block is to be multiplied with."""
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        rows, columns = weights[name].shape
        grid = torch.zeros(-(-rows // block[0]), -(-columns // block[1]))
        values = torch.empty_like(weights[name])
        for i in range(grid.shape[0]):
            for j in range(grid.shape[1]):
                where = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
                grid[i, j] = weights[name][where].abs().max() / 448
                values[where] = weights[name][where] / grid[i, j]
        weights[name], weights[f"{name}_scale_inv"] = values.to(torch.float8_e4m3fn), grid


@pytest.fixture
def fp8(tmp_path):
    """``fp8(family, block, dtype)``: a folder, and its tensors as they are meant."""

    def make(family, block, dtype, **changes):
        hf = tmp_path / "hf"
        make_hf(family, num_hidden_layers=2, **changes).save_pretrained(hf)
        write_tokenizer(hf)
        settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)}
        change(hf, lambda weights: quantise(weights, block), quantization_config=settings, dtype=dtype)
        stored = load_file(hf / "model.safetensors")
        meant = {name: t for name, t in stored.items() if not name.endswith("_scale_inv")}
        for name, tensor in meant.items():
            if tensor.dtype == torch.float8_e4m3fn:
                scales = torch.kron(stored[f"{name}_scale_inv"], torch.ones(block))
                wide = tensor.float() * scales[: tensor.shape[0], : tensor.shape[1]]
                meant[name] = wide.to(getattr(torch, dtype))
        return hf, meant

    return make


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("block", [(128, 128), (32, 16), (40, 128)], ids=str)
@pytest.mark.parametrize("family", ["qwen3", "qwen3-moe"])
def test_fp8_releases_are_dequantised(fp8, tmp_path, family, block, dtype):
    hf, meant = fp8(family, block, dtype)
    back = there_and_back(hf, tmp_path)
    for folder in (tmp_path / "megatron", back):
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    written = load_file(back / "model.safetensors")
    assert written.keys() == meant.keys()
    for name, tensor in meant.items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name], tensor), name
    wide = load_file(there_and_back(hf, tmp_path, dtype="float32") / "model.safetensors")
    assert all(torch.equal(wide[name].to(tensor.dtype), tensor) for name, tensor in meant.items()), "not rounded before"


def test_fp8_releases_are_what_transformers_makes_of_them(fp8, tmp_path):
    pytest.importorskip("accelerate")
    import transformers

    hf, _ = fp8("qwen3", (128, 128), "float32", hidden_size=128, intermediate_size=256, head_dim=64)
    settings = transformers.FineGrainedFP8Config(dequantize=True)
    wide = {"quantization_config": settings, "dtype": torch.float32}
    try:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(hf, **wide)
    except (ImportError, RuntimeError) as error:  # some releases want a GPU or triton
        pytest.skip(f"this transformers cannot: {error}")
    ours = load_file(there_and_back(hf, tmp_path) / "model.safetensors")
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.state_dict().items())


@pytest.mark.parametrize(
    ("weights", "settings", "says"),
    [
        (None, {"weight_block_size": [64, 128]}, "(quantization_config.weight_block_size) make"),
        (None, {"weight_block_size": None}, "quantization_config is set; give the unquantized checkpoint"),
        (None, {"quant_method": "gptq"}, "quantization_config is set; give the unquantized checkpoint"),
        (
            "model.layers.1.mlp.up_proj.weight_scale_inv",
            {},
            "up_proj.weight is stored as F8_E4M3; give the unquantized",
        ),
    ],
)
def test_other_quantised_releases_are_refused(fp8, tmp_path, weights, settings, says):
    hf, _ = fp8("qwen3", (32, 32), "bfloat16")
    config = json.loads((hf / "config.json").read_text())["quantization_config"] | settings
    change(hf, lambda w: {name: t for name, t in w.items() if name != weights}, quantization_config=config)
    assert says in refusal(hf, tmp_path)


def test_experts_in_one_tensor_keep_their_dtype_too(tmp_path):
    """The export holds them one by one."""
    model = save_hf("qwen3-moe", tmp_path / "hf", num_hidden_layers=2)

    def narrow(_):
        weights = {name: p.detach().clone() for name, p in stacked_experts(dict(model.named_parameters())).items()}
        return weights | {name: t.bfloat16() for name, t in weights.items() if ".1.mlp.experts" in name}

    back = load_file(there_and_back(change(tmp_path / "hf", narrow), tmp_path) / "model.safetensors")
    assert sum(".mlp.experts." in name for name in back) == 2 * 4 * 3, "layers, experts, matrices"
    assert all((t.dtype == torch.bfloat16) == (".1.mlp.experts." in name) for name, t in back.items())
