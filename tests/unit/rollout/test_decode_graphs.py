"""Decode steps as CUDA graphs: the same tokens, few captures, none again when weights change in place."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from models import VOCABULARY, save_megatron
from recorded_graph import pretend_graphs

from fire_megatron.checkpoint.loading import load_weights
from fire_megatron.config.errors import TrainingError
from fire_megatron.config.hf_config import read_hf_config
from fire_megatron.config.schema import StudentConfig
from fire_megatron.data.records import Prompt
from fire_megatron.models import kv_cache, packed_linear
from fire_megatron.models.build import build_model
from fire_megatron.platform.device import Device
from fire_megatron.platform.graphs import Graphs
from fire_megatron.rollout import engine as engines
from fire_megatron.rollout.decoder import Decoder
from fire_megatron.rollout.engine import MegatronEngine, row_bucket, uses_graphs
from fire_megatron.rollout.sampling import Sampling

LENGTHS = (3, 9, 1, 6, 4, 2, 8)


@pytest.fixture
def model(grid, tmp_path):
    return load("qwen3", grid, tmp_path)


def load(family, grid, tmp_path):
    save_megatron(family, tmp_path / "m", num_hidden_layers=2)
    role = StudentConfig(checkpoint=str(tmp_path / "m"))
    model = build_model(read_hf_config(tmp_path / "m"), role, grid, device=Device("cpu"))
    load_weights(model, tmp_path / "m", grid=grid)
    return model.eval()


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Graphs, numbers of rows and of positions as on a GPU; no weights in a CPU's layout."""
    graphs = pretend_graphs(monkeypatch)
    monkeypatch.setattr(packed_linear, "_usable", lambda weight: False)
    for module in (engines, kv_cache):
        monkeypatch.setattr(module, "device_kind", lambda device: "cuda")
    return graphs


def make(model, grid, *, graphs, keep_cache=True, sync_every=0):
    engine = MegatronEngine(model, grid, sync_every=sync_every, keep_cache=keep_cache)
    engine.graphs = Graphs(graphs)
    return engine


def tokens(engine, step=0, **settings):
    generator = torch.Generator().manual_seed(2)
    draws = [torch.randint(6, VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]
    prompts = [Prompt(i, "math", tuple(draw), "") for i, draw in enumerate(draws)]
    sampling = Sampling(**{"max_new_tokens": 12, "seed": 3, **settings})
    made = engine.generate(prompts, range(len(prompts)), sampling=sampling, step=step)
    for row, values in enumerate(made.log_probs):
        assert len(values) == len(made.responses[row]) and (values < 0).all()
    return [response.tolist() for response in made.responses]


@pytest.mark.parametrize("family", ["phi3", "llama-dynamic"])
def test_graphs_follow_the_length_that_rotary_angles_are_of(family, grid, pretended_gpu, tmp_path):
    """As where a benchmark's rows are longer than a run's, and the run goes on afterwards."""
    model, made = load(family, grid, tmp_path), []
    engine = make(model, grid, graphs=True)
    for longest in (12, 60, 12):
        with model.rotary_angles.fixed(longest):
            made.append(tokens(engine))
            assert made[-1] == tokens(make(model, grid, graphs=False))
    assert made[0] == made[2] != made[1]
    assert len(pretended_gpu) == engine.graphs.captured <= 2, "not captured again"


def test_the_same_tokens_with_few_captures(model, grid, pretended_gpu, monkeypatch):
    whole = tokens(make(model, grid, graphs=False))
    ends = {"stop_ids": frozenset(whole[row][at] for row, at in ((0, 2), (1, 5), (3, 0), (5, 8)))}
    expected = tokens(make(model, grid, graphs=False), **ends)
    assert len({len(row) for row in expected}) > 2
    engine = make(model, grid, graphs=True, sync_every=4)
    reads, read = [], Decoder.read
    monkeypatch.setattr(Decoder, "read", lambda self, *sizes: reads.append(sizes) or read(self, *sizes))
    assert tokens(engine, batch_size=3, **ends) == expected
    sampled = sum(map(len, expected))
    assert len(reads) < sampled / 4, "the host looks at many tokens at a time"
    captured = engine.graphs.captured
    assert 0 < captured == len(pretended_gpu) <= 3, "one for each number of rows"
    assert sum(graph.replays for graph in pretended_gpu) > 2 * captured

    # A second step, whose weights have changed in place.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    anew = tokens(make(model, grid, graphs=False), step=1, **ends)
    assert tokens(engine, step=1, batch_size=3, **ends) == anew
    assert len(pretended_gpu) == captured, "not captured again"

    # Weights that are elsewhere, as after a stay on the host.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    anew = tokens(make(model, grid, graphs=False), step=1, **ends)
    assert tokens(engine, step=1, batch_size=3, **ends) == anew
    assert len(pretended_gpu) > captured, "captured anew"


def test_without_a_kept_cache_each_call_captures_its_own(model, grid, pretended_gpu):
    engine = make(model, grid, graphs=True, keep_cache=False, sync_every=3)
    assert tokens(engine) == tokens(engine)
    assert len(pretended_gpu) == 2 and engine._decoder is None, "the memory is given back"


def test_one_engine_of_several_samplings(model, grid, pretended_gpu):
    """A graph is of one temperature and nucleus, and is replayed for no other; memory is what a sampling needs."""
    ways = [{}, {"temperature": 0.0}, {"temperature": 0.6}, {"top_p": 0.5}, {"seed": 4}]
    expected = [tokens(make(model, grid, graphs=False), **way) for way in ways]
    assert len({str(made) for made in expected}) == len(ways)
    engine, captured = make(model, grid, graphs=True, sync_every=3), []
    for _ in range(2):
        for way, made in zip(ways, expected, strict=True):
            assert tokens(engine, **way) == made, way
            captured.append(engine.graphs.captured)
    assert captured[:4] == sorted({*captured[:4]}), "each its own"
    assert captured[4:] == captured[3:4] * 6, "another seed needs none, and none is captured again"

    kept = engine._decoder
    assert tokens(engine, max_new_tokens=5) == [row[:5] for row in expected[0]]
    assert tokens(engine, batch_size=2) == expected[0]
    assert engine._decoder is kept, "what fits into the memory uses it"
    long = tokens(engine, max_new_tokens=90, batch_size=2)
    assert [row[:12] for row in long] == expected[0]
    assert (engine._decoder.slots, engine._decoder.cache.max_length) == (2, 128), "not all rows at the full length"
    assert tokens(engine) == expected[0]
    assert (engine._decoder.slots, engine._decoder.cache.max_length) == (len(LENGTHS), 64)


def test_what_cannot_be_captured_ends_with_the_key(model, grid, pretended_gpu, monkeypatch):
    compute = Decoder._compute
    monkeypatch.setattr(Decoder, "_compute", lambda self, *sizes: (self._tokens.sum().item(), compute(self, *sizes)))
    with pytest.raises(TrainingError, match=r"set rollout\.cuda_graphs: false"):
        tokens(make(model, grid, graphs=True))
    assert tokens(make(model, grid, graphs=False))


def test_few_graphs_are_kept(pretended_gpu, monkeypatch):
    monkeypatch.setattr("fire_megatron.platform.graphs.MOST", 2)
    graphs, memory = Graphs(True), torch.zeros(1)
    for key in (1, 1, 2, 2, 1, 3, 3, 1, 2):  # the least recently used goes: 2, when 3 comes
        graphs.run(key, lambda: memory.add_(1))
    assert memory == 9, "each time once, captured or not"
    assert graphs.captured == 4 == len(pretended_gpu)


def test_when_there_are_graphs(model):
    experts = SimpleNamespace(config=SimpleNamespace(num_moe_experts=4))
    assert uses_graphs(True, model, on_gpu=True)
    assert not uses_graphs(True, model, on_gpu=False)
    assert not uses_graphs(False, model, on_gpu=True)
    assert not uses_graphs(True, experts, on_gpu=True)


def test_numbers_of_rows_are_few_on_a_gpu():
    assert [row_bucket(n, "cpu") for n in (0, 1, 5, 33)] == [1, 1, 5, 33]
    buckets = {row_bucket(n, "cuda") for n in range(1, 513)}
    assert len(buckets) < 35 and all(row_bucket(n, "cuda") >= n for n in range(1, 513))
    assert all(row_bucket(n, "cuda") <= max(8, n * 1.25) + 8 for n in range(1, 513))
