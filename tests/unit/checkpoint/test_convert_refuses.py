"""What conversion refuses: the message names the file or tensor, nothing is left behind, nothing there is changed."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from models import make_hf

from fire_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf
from fire_megatron.config.errors import CheckpointError

INDEX = "model.safetensors.index.json"
NORM = "model.layers.1.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def converted(published, tmp_path_factory):
    """``published`` converted; no test may change it."""
    return hf_to_megatron(published, tmp_path_factory.mktemp("converted") / "model")


@pytest.fixture
def sharded(tmp_path):
    """A Hugging Face folder of several files."""
    make_hf("llama", num_hidden_layers=2).save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    assert len(files_of(tmp_path / "hf")) >= 4
    return tmp_path / "hf"


@pytest.fixture
def refused(tmp_path):
    """Checks that an action raises with these words, and that no folder, temporary or half-written, is left."""

    def check(action, *words):
        before = set(tmp_path.iterdir())
        with pytest.raises(CheckpointError) as error:
            action()
        assert all(word in str(error.value) for word in words), f"{error.value}\nlacks one of {words}"
        assert set(tmp_path.iterdir()) == before
        # An open file keeps its folder from being removed on NFS.
        descriptors = Path("/proc/self/fd")
        opened = [os.path.realpath(fd) for fd in descriptors.iterdir()] if descriptors.exists() else []
        assert not [name for name in opened if ".tmp_" in name]

    return check


def files_of(folder):
    """The files of weights, in order."""
    return sorted(folder.glob("*.safetensors"))


def cut(path, keep=0.5):
    """Cut a file short."""
    size = path.stat().st_size
    with path.open("rb+") as stream:
        stream.truncate(int(size * keep))


@pytest.mark.parametrize("keep", [0.0, 1e-5, 0.5, 0.9999])
def test_a_file_that_is_cut_short(damaged, refused, tmp_path, keep):
    hf = damaged()
    cut(hf / "model.safetensors", keep)
    refused(lambda: hf_to_megatron(hf, tmp_path / "out"), f"{hf / 'model.safetensors'}: cut short or damaged")


def test_a_shard_that_the_index_names_is_missing(sharded, refused, tmp_path):
    lost = files_of(sharded)[1]
    lost.unlink()
    refused(lambda: hf_to_megatron(sharded, tmp_path / "out"), f"{lost}: missing", INDEX)


def test_a_tensor_that_the_index_names_is_in_no_file(sharded, refused, tmp_path):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = files_of(sharded)[0].name
    (sharded / INDEX).write_text(json.dumps(index))
    refused(lambda: hf_to_megatron(sharded, tmp_path / "out"), INDEX, "model.layers.9.mlp.up_proj.weight")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "\x00"])
def test_a_damaged_index(sharded, refused, tmp_path, text):
    (sharded / INDEX).write_text(text)
    refused(lambda: hf_to_megatron(sharded, tmp_path / "out"), str(sharded / INDEX), "copy it again")


def test_a_missing_tensor(damaged, refused, tmp_path):
    hf = damaged(lambda weights: weights.pop(NORM))
    refused(lambda: hf_to_megatron(hf, tmp_path / "out"), str(hf), "1 tensors are missing", NORM)


def test_a_tensor_of_another_architecture(damaged, refused, tmp_path):
    name = "model.layers.0.self_attn.q_proj.bias"
    hf = damaged(lambda weights: weights.update({name: torch.ones(64)}))
    refused(lambda: hf_to_megatron(hf, tmp_path / "out"), "1 tensors are not of a llama model", name)


def test_a_wrong_shape(damaged, refused, tmp_path):
    hf = damaged(lambda weights: weights.update({EMBEDDING: torch.ones(300, 64)}))
    refused(lambda: hf_to_megatron(hf, tmp_path / "out"), EMBEDDING, "(300, 64)", "(301, 64)")


def test_the_config_of_another_model(damaged, refused, tmp_path):
    hf = damaged(num_hidden_layers=3)
    refused(lambda: hf_to_megatron(hf, tmp_path / "out"), "9 tensors are missing", "model.layers.2.", "config.json")
    hf_config = json.loads((hf / "config.json").read_text()) | {"num_hidden_layers": 1}
    (hf / "config.json").write_text(json.dumps(hf_config))
    refused(lambda: hf_to_megatron(hf, tmp_path / "out"), "9 tensors are not of a llama model", "model.layers.1.")


def test_no_weights_or_no_folder(damaged, refused, tmp_path):
    refused(lambda: hf_to_megatron(tmp_path / "absent", tmp_path / "out"), "absent does not exist")
    hf = damaged()
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    refused(lambda: hf_to_megatron(hf, tmp_path / "out"), f"{hf}: no *.safetensors", "safe_serialization=True")


def test_a_dtype_that_is_not_offered(published, converted, refused, tmp_path):
    for convert, source in ((hf_to_megatron, published), (megatron_to_hf, converted)):
        refused(lambda c=convert, s=source: c(s, tmp_path / "out", dtype="fp8"), "--dtype fp8", "float32, bfloat16")


def test_an_output_that_exists_is_kept_without_overwrite(published, converted, refused, snapshot, tmp_path):
    for convert, source, what in (
        (hf_to_megatron, published, "a converted checkpoint"),
        (megatron_to_hf, converted, "a Hugging Face model"),
    ):
        out = convert(source, tmp_path / convert.__name__)
        before = snapshot(out)
        refused(lambda c=convert, s=source, o=out: c(s, o), f"{out}: already holds {what}; pass --overwrite")
        assert snapshot(out) == before


def test_what_is_not_ours_is_kept_even_with_overwrite(published, converted, refused, snapshot, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("It was a dark and stormy night.")
    (tmp_path / "file").write_text("text")
    before = snapshot(tmp_path)
    for convert, source in ((hf_to_megatron, published), (megatron_to_hf, converted)):
        for name in before.keys() & {"thesis", "file"}:
            out = tmp_path / name
            refused(lambda c=convert, s=source, o=out: c(s, o, overwrite=True), f"{out}: exists and is not")
    # Each would otherwise destroy its own source.
    source = tmp_path / "hf"
    shutil.copytree(published, source)
    refused(lambda: hf_to_megatron(source, source, overwrite=True), "is not a converted checkpoint")
    shutil.rmtree(source)
    assert snapshot(tmp_path) == before


@pytest.fixture
def full_disk(monkeypatch):
    """From now on no file may grow beyond 20 kB: what a full disk does, at a moment of our choosing."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def occupied(published, converted, tmp_path):
    """Outputs of an earlier conversion, one of each kind."""
    shutil.copytree(converted, tmp_path / "hf_to_megatron")
    shutil.copytree(published, tmp_path / "megatron_to_hf")
    return tmp_path


@pytest.mark.parametrize("convert", [hf_to_megatron, megatron_to_hf], ids=lambda function: function.__name__)
def test_a_full_disk(convert, published, converted, occupied, refused, snapshot, full_disk):
    source = published if convert is hf_to_megatron else converted
    before = snapshot(occupied)
    for name in (convert.__name__, "new"):
        out = occupied / name
        refused(lambda o=out: convert(source, o, overwrite=True), f"{out}: cannot be written", "File too large")
    assert snapshot(occupied) == before


def test_a_source_that_fails_halfway(sharded, occupied, refused, snapshot, monkeypatch):
    """The last file's weights turn unreadable after the others have been converted, as on a network file system."""
    import fire_megatron.checkpoint.convert as module

    packed, out = module.pack, occupied / "hf_to_megatron"
    before = snapshot(out)
    last = files_of(sharded)[-1]

    def pack(tensor, parts, shape):
        if tensor.key.startswith("decoder.layers.1"):
            last.write_bytes(b"")
        return packed(tensor, parts, shape)

    monkeypatch.setattr(module, "pack", pack)
    refused(lambda: hf_to_megatron(sharded, out, overwrite=True), f"{last}: cut short")
    assert snapshot(out) == before


def test_an_interruption_leaves_nothing(published, occupied, snapshot, monkeypatch):
    import fire_megatron.checkpoint.convert as module

    def carry_files(source, target):
        assert any((target / "weights").iterdir()), "by now the weights are written"
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "carry_files", carry_files)
    before = snapshot(occupied)
    with pytest.raises(KeyboardInterrupt):
        hf_to_megatron(published, occupied / "hf_to_megatron", overwrite=True)
    assert snapshot(occupied) == before


def shard_file(checkpoint):
    """The first file of weights."""
    return checkpoint / "weights" / "__0_0.distcp"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda c: cut(shard_file(c)), ("__0_0.distcp is cut short",)),
        (lambda c: shard_file(c).unlink(), ("__0_0.distcp is missing",)),
        (lambda c: cut(c / "weights" / ".metadata"), (".metadata: damaged",)),
        (lambda c: (c / "weights" / ".metadata").unlink(), ("is not a complete checkpoint",)),
        (lambda c: (c / "fire_checkpoint.json").unlink(), ("is not a complete checkpoint",)),
        (lambda c: (c / "config.json").unlink(), ("config.json is missing",)),
        (lambda c: shard_file(c).write_bytes(b"\0" * shard_file(c).stat().st_size), ("__0_0.distcp: damaged",)),
    ],
    ids=["cut", "no weights", "cut metadata", "no metadata", "no marker", "no config", "zeros"],
)
def test_export_of_a_damaged_checkpoint(damage, words, converted, refused, tmp_path):
    shutil.copytree(converted, tmp_path / "damaged")
    damage(tmp_path / "damaged")
    refused(lambda: megatron_to_hf(tmp_path / "damaged", tmp_path / "out"), str(tmp_path / "damaged"), *words)


def test_export_of_something_else(published, converted, refused, tmp_path):
    def export(folder, **options):
        return lambda: megatron_to_hf(folder, tmp_path / "out", **options)

    refused(export(published), f"{published} is a Hugging Face folder and must be converted first")
    refused(export(converted, shard_gb=0), "--shard-gb 0: give a size above 0")


def test_export_with_the_config_of_another_model(converted, refused, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(converted, other)
    for changes, words in (
        ({"num_hidden_layers": 3}, ("6 tensors are missing", "decoder.layers.2.")),
        ({"intermediate_size": 95}, ("decoder.layers.0.mlp.linear_fc1.weight", "(192, 64)", "(190, 64)")),
        ({"vocab_size": 302}, ("embedding.word_embeddings.weight", "(301, 64)", "(302, 64)")),
        ({"vocab_size": 300}, ("embedding.word_embeddings.weight", "(301, 64)", "(300, 64)")),
    ):
        config = json.loads((converted / "config.json").read_text()) | changes
        (other / "config.json").write_text(json.dumps(config))
        refused(lambda: megatron_to_hf(other, tmp_path / "out"), *words)
