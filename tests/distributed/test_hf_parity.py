"""Logits of every converted family equal transformers' in every layout: packed rows against single rows."""

import pytest
import torch
import torch.distributed as dist
from models import FAMILIES, VOCABULARY
from roles import Spec, expert_sizes, hf_logits, layouts, reference, telling_layouts

from fire_megatron.data.packing import pack_rows, whole_tokens
from fire_megatron.models.pipeline import run_pipeline

LENGTHS = (1, 40, 3, 8, 17)
"""Around the small sliding window of 7, and far above; odd, so that sequence parallelism has to pad."""
TOLERANCE = 1e-5
"""Of the largest logit; float32 gives 2e-6."""


def draw_rows(lengths=LENGTHS):
    """Rows of random tokens, padding-token id 0 and end-of-sequence included."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(VOCABULARY, (n,), generator=generator) for n in lengths]


def megatron_logits(model, grid, rows):
    """[L, whole padded vocabulary] logits of each row, from two packs; empty unless this is a last stage."""
    # A pack projects the positions that predict its response: with one more token a row, all of the row.
    prompts, responses = [r[:1] for r in rows], [torch.cat((r[1:], r[:1])) for r in rows]
    multiple = grid.layout.tensor if model.config.sequence_parallel else 1
    device = next(model.parameters()).device
    context = {"context": grid.layout.context, "context_rank": grid.cp_rank}
    packs = [
        pack_rows(prompts, responses, part, multiple=multiple, device=device, **context)
        for part in (range(3), range(3, len(rows)))
    ]
    model.eval()

    def last_stage(hidden, pack):
        return whole_tokens(model.logits(hidden), pack, group=grid.pg.cp)

    with torch.no_grad():
        outputs = run_pipeline(model, packs, last_stage, grid=grid, forward_only=True)
    if not outputs:
        return []
    local = torch.cat(outputs)
    shards = [torch.empty_like(local) for _ in range(grid.layout.tensor)]
    dist.all_gather(shards, local.contiguous(), group=grid.pg.tp)
    return torch.cat(shards, dim=-1).split([len(r) for r in rows])


def largest_difference(model, grid, rows, hf):
    """Largest difference from transformers over the largest logit, over all ranks; checks shapes and padding."""
    worst = 0.0
    ours = megatron_logits(model, grid, rows)
    assert len(ours) == (len(rows) if grid.is_last_stage else 0)
    for row, logits in zip(rows, ours, strict=False):
        expected = hf_logits(hf, torch.cat((row, row[:1])))[:-1]  # of the very row that the pack holds
        assert torch.equal(logits[:, VOCABULARY:], torch.full_like(logits[:, VOCABULARY:], float("-inf")))
        assert logits.shape[1] % grid.layout.tensor == 0 and logits.shape[1] > VOCABULARY
        difference = (logits[:, :VOCABULARY] - expected).abs().max() / expected.abs().max()
        worst = max(worst, float(difference))
    everywhere = torch.tensor([worst])
    dist.all_reduce(everywhere, op=dist.ReduceOp.MAX)
    return float(everywhere)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(roles, world_size, family):
    spec, rows = Spec(family), draw_rows()
    contexts = (1, 2, 4) if "window" in family else (1, 2)
    for layout in telling_layouts(world_size, contexts=contexts, experts=expert_sizes(family, world_size)):
        model, grid = roles.build(spec, layout)
        assert largest_difference(model, grid, rows, reference(spec)) < TOLERANCE, layout


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    "spec",
    [Spec("qwen3", changes=(("num_key_value_heads", 1),)), Spec("qwen2"), Spec("mistral-window")],
    ids=lambda spec: spec.family,
)
def test_tensor_ranks_share_key_heads(roles, world_size, spec):
    """More ranks than one key/value head, and on 4 ranks than two."""
    for layout in layouts(world_size, tensors=(2, 4), contexts=(1, 2)):
        if layout.tensor > dict(spec.changes).get("num_key_value_heads", 2):
            for sequence in (True, False):
                model, grid = roles.build(spec, layout, sequence=sequence)
                assert largest_difference(model, grid, draw_rows(), reference(spec)) < TOLERANCE, layout


@pytest.mark.world_size(2)
@pytest.mark.parametrize("family", ["llama3-tied", "qwen3"])
def test_without_sequence_parallelism(roles, world_size, family):
    spec = Spec(family)
    for layout in layouts(world_size, tensors=(2,), contexts=(1, 2)):
        model, grid = roles.build(spec, layout, sequence=False)
        assert not model.config.sequence_parallel
        assert largest_difference(model, grid, draw_rows(), reference(spec)) < TOLERANCE, layout


def test_stages_of_unequal_depth(roles, world_size):
    spec = Spec("qwen2", changes=(("num_hidden_layers", 5),))
    for layout in layouts(world_size):
        if layout.pipeline > 1:
            model, grid = roles.build(spec, layout)
            assert largest_difference(model, grid, draw_rows(), reference(spec)) < TOLERANCE, layout


@pytest.mark.world_size(2)
def test_a_shard_of_padding_alone(roles, world_size):
    # 400 columns a shard leave the second shard without one real entry.
    spec = Spec("llama")
    model, grid = roles.build(spec, layouts(world_size, tensors=(2,))[0], vocab_multiple=400)
    assert largest_difference(model, grid, draw_rows(), reference(spec)) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_the_reference_tells_models_apart(roles, world_size, family):
    # Guards the tolerance: another seed, and a window off by one, are far outside it.
    other = Spec(family, seed=9) if family == "llama" else Spec(family, changes=(("sliding_window", 6),))
    for layout in (layouts(world_size)[0], *layouts(world_size, contexts=(2,))[:1]):
        model, grid = roles.build(Spec(family), layout)
        assert largest_difference(model, grid, draw_rows(), reference(other)) > 100 * TOLERANCE


@pytest.mark.parametrize("family", ["llama", "llama3-tied"])
def test_transformers_loads_in_a_process_of_the_program(roles, family):
    # from_pretrained builds on the meta device, through the very factories that the CPU seam wraps.
    import transformers

    path = roles.checkpoint(Spec(family))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path.with_name(path.name + "-hf")).eval()
    row = draw_rows()[1]
    torch.testing.assert_close(hf_logits(loaded, row), hf_logits(reference(Spec(family)), row), rtol=0, atol=1e-5)
    with torch.device("meta"):
        assert torch.arange(3).is_meta
