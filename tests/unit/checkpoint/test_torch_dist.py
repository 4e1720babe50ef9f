"""The torch_dist format: torch's and megatron-core's own readers and writers against ours; every slice of a tensor."""

from __future__ import annotations

import itertools
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from models import save_megatron
from processes import call

from fire_megatron.checkpoint.checksums import CHECKSUMS
from fire_megatron.checkpoint.loading import global_shapes, load_weights
from fire_megatron.checkpoint.shards import model_shards
from fire_megatron.checkpoint.torch_dist import METADATA, ShardReader, ShardWriter, read_common, write_metadata
from fire_megatron.checkpoint.whole import require_tensors
from fire_megatron.config.errors import CheckpointError, DamagedCheckpoint
from fire_megatron.config.hf_config import read_hf_config
from fire_megatron.config.schema import StudentConfig
from fire_megatron.models.build import build_model
from fire_megatron.platform.device import Device

TENSORS = {
    "matrix": torch.arange(35, dtype=torch.float32).reshape(5, 7),
    "half": torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "vector": torch.arange(9, dtype=torch.int64),
    "cube": torch.arange(24, dtype=torch.float16).reshape(2, 3, 4),
    "number": torch.tensor(3.5, dtype=torch.float64),
}


def write(folder, tensors, pieces=1, file_bytes=2**30):
    """Write tensors as ``pieces`` ranks do, each a slice of rows."""
    folder.mkdir()
    entries = []
    for rank in range(pieces):
        writer = ShardWriter(folder, rank=rank, file_bytes=file_bytes)
        for key, tensor in tensors.items():
            offset = (0,) * tensor.dim()
            if tensor.dim() == 0:
                if rank == 0:
                    writer.write(key, tensor, offset=offset, global_shape=())
                continue
            rows = torch.arange(len(tensor)).tensor_split(pieces)[rank]
            if len(rows):
                part = tensor[rows[0] : rows[-1] + 1]
                writer.write(key, part, offset=(int(rows[0]), *offset[1:]), global_shape=tensor.shape)
        entries += writer.close()
    write_metadata(folder, entries, common={"step": 7})
    return folder


def check_read(reader, tensors):
    """A reader gives these tensors, bit by bit."""
    assert reader.tensors.keys() == tensors.keys()
    reader.check_files()
    for key, tensor in tensors.items():
        assert reader.tensors[key].shape == tensor.shape and reader.tensors[key].dtype == tensor.dtype
        assert torch.equal(reader.read(key), tensor), key


@pytest.mark.parametrize("pieces", [1, 2, 3])
@pytest.mark.parametrize("file_bytes", [1, 2**30])
def test_what_is_written_is_read(pieces, file_bytes, tmp_path):
    folder = write(tmp_path / "w", TENSORS, pieces, file_bytes)
    check_read(ShardReader(folder), TENSORS)
    assert read_common(folder) == {"step": 7}
    files = len(list(folder.glob("*.distcp")))
    assert files == pieces if file_bytes > 1 else files > pieces, "one file a rank, unless it grows too large"


def test_a_view_is_stored_without_the_rest_of_its_memory(tmp_path):
    """torch.save would write all of the memory that a view looks at: each half of an fc1 would bring the other."""
    whole = torch.randn(1000, 100)
    folder = write(tmp_path / "w", {"part": whole[10:12], "transposed": whole[:3].t()})
    check_read(ShardReader(folder), {"part": whole[10:12], "transposed": whole[:3].t()})
    assert sum(path.stat().st_size for path in folder.glob("*.distcp")) < 10_000


@pytest.mark.parametrize("pieces", [1, 3])
def test_every_slice(pieces, tmp_path):
    reader = ShardReader(write(tmp_path / "w", TENSORS, pieces))
    matrix = TENSORS["matrix"]
    for top, left in itertools.product(range(5), range(7)):
        for height, width in itertools.product(range(1, 6 - top), range(1, 8 - left)):
            target = torch.full((height, width), torch.nan)
            reader.read_into(target, "matrix", offset=(top, left))
            assert torch.equal(target, matrix[top : top + height, left : left + width])


def test_a_slice_into_a_part_of_something_larger(tmp_path):
    """A rank's gate and up projection lie in one parameter; each is filled by itself, in the parameter's dtype."""
    reader = ShardReader(write(tmp_path / "w", TENSORS, 2))
    parameter = torch.full((4, 8), -1.0, dtype=torch.float64)
    reader.read_into(parameter[:, 2:6], "half", offset=(1, 0))
    assert torch.equal(parameter[:, 2:6], TENSORS["half"][1:5].double())
    assert (parameter[:, :2] == -1).all() and (parameter[:, 6:] == -1).all()


def test_rows_beyond_the_tensor_become_zero(tmp_path):
    """A vocabulary that does not divide is padded; the last tensor-parallel rank may hold nothing else."""
    reader = ShardReader(write(tmp_path / "w", TENSORS, 2))
    for top, real in ((3, 2), (5, 0), (8, 0)):
        target = torch.full((4, 7), torch.nan)
        reader.read_into(target, "matrix", offset=(top, 0))
        assert torch.equal(target[:real], TENSORS["matrix"][top : top + real])
        assert torch.equal(target[real:], torch.zeros(4 - real, 7))


def test_torch_reads_ours(tmp_path):
    folder = write(tmp_path / "w", TENSORS, 3)
    loaded = {key: torch.zeros_like(tensor) for key, tensor in TENSORS.items()}
    dcp.load(loaded, checkpoint_id=folder, no_dist=True)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in TENSORS.items())


def test_ours_reads_torch(tmp_path):
    dcp.save({**TENSORS, "epoch": 3}, checkpoint_id=tmp_path / "w", no_dist=True)
    check_read(ShardReader(tmp_path / "w"), TENSORS)


def test_megatron_reads_ours(grid, tmp_path):
    folder = write(tmp_path / "w", TENSORS, 3)
    wanted = {key: ShardedTensor.from_rank_offsets(key, torch.zeros_like(t)) for key, t in TENSORS.items()}
    loaded = dist_checkpointing.load(wanted, str(folder))
    assert all(torch.equal(loaded[key], tensor) for key, tensor in TENSORS.items())


@pytest.fixture(scope="module")
def model(grid, tmp_path_factory):
    """A loaded model, its checkpoint and its section of a recipe."""
    folder = tmp_path_factory.mktemp("models") / "qwen3"
    save_megatron("qwen3", folder, num_hidden_layers=2)
    role = StudentConfig(checkpoint=str(folder), vocab_multiple=4)
    model = build_model(read_hf_config(folder), role, grid, device=Device("cpu"))
    load_weights(model, folder, grid=grid)
    return model, folder


def test_ours_reads_a_model_that_megatron_saved(model, tmp_path):
    """megatron-core's own save of the built model holds the tensors that conversion writes, in the same order."""
    _, folder = model
    (tmp_path / "w").mkdir()
    call(Path(__file__).with_name("megatron_save.py"), folder, tmp_path / "w")
    theirs, ours = ShardReader(tmp_path / "w"), ShardReader(folder / "weights")
    theirs.check_files()
    assert set(ours.tensors) <= set(theirs.tensors)
    for key in ours.tensors:
        expected, actual = ours.read(key), theirs.read(key)
        assert torch.equal(actual[: len(expected)], expected), key
        # Beyond the vocabulary megatron-core stores the padding as well.
        assert actual.shape == expected.shape or (len(actual) == 304 and not actual[len(expected) :].any()), key


def test_megatron_reads_a_model_that_we_converted(model, grid):
    """Every parameter but those with padding, whose stored size is another."""
    model, folder = model
    state = model.sharded_state_dict(metadata={"non_homogeneous_layers": True, "dp_cp_group": grid.pg.dp_cp})
    parameters = dict(model.named_parameters())
    unpadded = {name: state[name] for name, p in parameters.items() if len(p) != 304}
    before = {name: parameters[name].detach().clone() for name in unpadded}
    assert len(parameters) - len(unpadded) == 2
    with torch.no_grad():
        for name in unpadded:
            parameters[name].zero_()
    loaded = dist_checkpointing.load(unpadded, str(folder / "weights"))
    wrong = [name for name in unpadded if not torch.equal(loaded[name], before[name])]
    with torch.no_grad():
        for name in unpadded:
            parameters[name].copy_(before[name])
    assert not wrong


def test_a_checkpoint_that_does_not_fit_the_model(model, grid, tmp_path):
    model, folder = model
    shards, tensors = model_shards(model, grid=grid), ShardReader(folder / "weights")
    require_tensors(tensors, global_shapes(shards))
    weights = {key: tensors.read(key) for key in tensors.tensors}
    norm = weights.pop("decoder.final_layernorm.weight")
    with pytest.raises(CheckpointError, match="1 tensors are missing, such as decoder.final_layernorm.weight"):
        require_tensors(ShardReader(write(tmp_path / "a", weights)), global_shapes(shards))
    wrong = {**weights, "decoder.final_layernorm.weight": norm[:-1]}
    with pytest.raises(CheckpointError, match=r"decoder.final_layernorm.weight has shape \(63,\) .* needs \(64,\)"):
        require_tensors(ShardReader(write(tmp_path / "b", wrong)), global_shapes(shards))


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "executed"),)


def test_metadata_runs_no_code(tmp_path):
    folder = write(tmp_path / "w", TENSORS)
    (folder / CHECKSUMS).unlink()
    (folder / METADATA).write_bytes(pickle.dumps(Payload(tmp_path)))
    with pytest.raises(CheckpointError, match=r"\.metadata: cannot be read .*refuses posix.mkdir"):
        ShardReader(folder)
    assert not (tmp_path / "executed").exists()


def rewrite(folder, change):
    """Change the metadata, as in a folder from elsewhere, which has no checksums."""
    (folder / CHECKSUMS).unlink()
    path = folder / METADATA
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def drop_a_chunk(metadata):
    """As if one rank's entries were lost."""
    metadata.state_dict_metadata["matrix"].chunks.pop()


def leave_the_folder(metadata):
    """A path from elsewhere."""
    place = next(iter(metadata.storage_data.values()))
    place.relative_path = "../" + place.relative_path


def compress(metadata):
    """torch can pass chunks through a compressor on their way."""
    next(iter(metadata.storage_data.values())).transform_descriptors = ["stream.zstd"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop_a_chunk, "matrix: the stored chunks do not add up"),
        (leave_the_folder, "outside the folder: ../__0_0"),
        (compress, r"is stored with \['stream.zstd'\], which is not supported"),
    ],
)
def test_metadata_that_is_not_for_us(change, says, tmp_path):
    folder = write(tmp_path / "w", TENSORS, 2)
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=says):
        ShardReader(folder)


def test_all_damaged_files_are_listed(tmp_path):
    folder = write(tmp_path / "w", TENSORS, 3)
    (folder / "__0_0.distcp").unlink()
    (folder / "__2_0.distcp").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"__0_0.distcp is missing; .*__2_0.distcp is cut short: 5 bytes of \d+"):
        ShardReader(folder).check_files()


def test_a_damaged_common_file(tmp_path):
    folder = write(tmp_path / "w", TENSORS)
    (folder / "common.pt").write_bytes(b"PK")
    with pytest.raises(DamagedCheckpoint, match="common.pt: damaged"):
        read_common(folder)
    (folder / CHECKSUMS).unlink()
    for damage in (lambda path: path, lambda path: path.unlink()):
        damage(folder / "common.pt")
        with pytest.raises(DamagedCheckpoint, match="common.pt: cannot be read"):
            read_common(folder)


def test_every_bit_is_checked(tmp_path):
    """A bit flipped anywhere in a file of tensors is found by whoever reads the tensor, and by nobody else."""
    folder = write(tmp_path / "w", TENSORS)
    path = folder / "__0_0.distcp"
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 97)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        reader, found = ShardReader(folder), []
        reader.check_files()
        for key in reader.tensors:
            try:
                reader.read(key)
            except DamagedCheckpoint as error:
                assert f"{path}: damaged" in str(error)
                found.append(key)
        assert len(found) == 1, place
    (folder / CHECKSUMS).unlink()
    path.write_bytes(whole)
    assert set(ShardReader(folder).tensors) == set(TENSORS), "a folder without checksums is read as well"
