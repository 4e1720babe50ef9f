"""Generation equals transformers' token by token: greedy and sampled, in every layout and batch."""

import itertools
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import FAMILIES, ORIGINAL, VOCABULARY
from recorded_graph import pretend_graphs
from roles import (
    Spec,
    expert_sizes,
    hf_response_logits,
    layouts,
    log_prob_and_entropy,
    reference,
    share,
    telling_layouts,
)

from fire_megatron.checkpoint.convert import hf_to_megatron
from fire_megatron.data.records import Prompt
from fire_megatron.models import packed_linear
from fire_megatron.models.kv_cache import KVCache
from fire_megatron.parallel.grid import Layout
from fire_megatron.rollout import engine as engines
from fire_megatron.rollout.engine import MegatronEngine
from fire_megatron.rollout.sampler import uniforms
from fire_megatron.rollout.sampling import Sampling
from fire_megatron.teachers.teacher import Teacher

SEED, STEP = 5, 3
PROMPT_LENGTHS = (1, 9, 3, 14, 6, 2, 11)
"""Below and above the small sliding window of 7."""
NEW_TOKENS = 12
SMOLLM2 = Path(os.environ.get("FIRE_SMOLLM2") or Path(__file__).parents[2] / "demo" / "hf" / "math")


def draw_prompts(lengths=PROMPT_LENGTHS):
    """One prompt a length; row i is prompt i in whatever batch it is."""
    generator = torch.Generator().manual_seed(2)
    tokens = [torch.randint(6, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return [Prompt(i, "math", tuple(t), "") for i, t in enumerate(tokens)]


def generate_rows(model, grid, prompts, rows, *, stop_ids=(), sync_every=0, **settings):
    """This replica's rows by id: (tokens, log-probs, entropies, truncated)."""
    sampling = Sampling(**{"max_new_tokens": NEW_TOKENS, "seed": SEED, "stop_ids": frozenset(stop_ids), **settings})
    engine = MegatronEngine(model, grid, sync_every=sync_every)
    engine.publish(STEP)
    made = engine.generate([prompts[i] for i in rows], rows, sampling=sampling, step=STEP)
    assert made.row_ids == tuple(rows) and made.weight_version == STEP and not model.training
    columns = zip(made.responses, made.log_probs, made.entropies, made.truncated, strict=True)
    return dict(zip(rows, columns, strict=True))


def generate(model, grid, prompts, rows=None, **settings):
    """All rows, shared over the replicas and put together on every rank; ranks that hold the same row agree."""
    rows = list(range(len(prompts))) if rows is None else rows
    mine = [rows[i] for i in grid.own_rows(len(rows))]
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, generate_rows(model, grid, prompts, mine, **settings))
    whole = {}
    for part in gathered:
        for row, values in part.items():
            for ours, theirs in zip(values, whole.setdefault(row, values), strict=True):
                assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs)), row
    assert sorted(whole) == sorted(rows)
    return whole


def assert_same(actual, expected, case, *, atol=2e-5):
    """The same tokens in the same rows; log-probs and entropies within rounding."""
    assert actual.keys() == expected.keys(), case
    for row, (tokens, log_probs, entropies, truncated) in actual.items():
        assert tokens.tolist() == expected[row][0].tolist(), f"{case}, row {row}"
        assert truncated == expected[row][3], f"{case}, row {row}"
        torch.testing.assert_close(log_probs, expected[row][1], rtol=0, atol=atol)
        torch.testing.assert_close(entropies, expected[row][2], rtol=0, atol=atol)


def choose(logits, numbers, temperature, top_p):
    """Reference sampler over dense logits [R, vocabulary] in float64: tokens, and their log-probs as sampled."""
    if temperature == 0:
        return logits.argmax(-1), log_prob_and_entropy(logits, logits.argmax(-1))[0]
    mass = (logits.double() / temperature).softmax(-1)
    ranked, order = mass.sort(dim=-1, descending=True)
    outside = ranked.cumsum(-1) - ranked >= top_p
    mass = mass.scatter(-1, order, ranked.masked_fill(outside, 0.0))
    mass = mass / mass.sum(-1, keepdim=True)
    tokens = (mass.cumsum(-1) <= numbers[:, None]).sum(-1)
    return tokens, mass.gather(-1, tokens[:, None]).squeeze(-1).log()


def assert_equals_transformers(hf, prompts, made, *, temperature=1.0, top_p=1.0):
    """Each token is the one that transformers' logits, after the tokens before it, give: by induction the whole row
    is what decoding with transformers gives. So are log-probs (as sampled) and entropies (full softmax)."""
    for row, (tokens, log_probs, entropies, _) in made.items():
        logits = hf_response_logits(hf, torch.tensor(prompts[row].token_ids), tokens)
        numbers = torch.cat([uniforms(SEED, STEP, [row], position) for position in range(len(tokens))])
        expected, expected_log_probs = choose(logits, numbers, temperature, top_p)
        assert tokens.tolist() == expected.tolist(), row
        torch.testing.assert_close(log_probs.double(), expected_log_probs, rtol=0, atol=1e-4)
        torch.testing.assert_close(entropies.double(), log_prob_and_entropy(logits, tokens)[1], rtol=0, atol=1e-4)


# Without its window mistral is a llama. Of pairs of dimensions each is tried with what families may have of their own.
PAIRED = {"llama3-tied", "mistral-window", "qwen2-windows", "qwen3-moe-mixed"}
BY_LENGTH = {"phi3", "llama-dynamic"}
"""Whose angles depend on how long a row is going to be, which sampling does not know."""


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(x, marks=() if x in PAIRED else pytest.mark.two_ranks)
        for x in sorted({*FAMILIES} - {"mistral"} - BY_LENGTH)
    ],
)
def test_greedy_equals_transformers(roles, world_size, family):
    spec, prompts = Spec(family), draw_prompts()
    for layout in telling_layouts(world_size, experts=expert_sizes(family, world_size)):
        model, grid = roles.build(spec, layout)
        made = generate(model.eval(), grid, prompts, temperature=0)
        assert all(len(tokens) == NEW_TOKENS and truncated for tokens, _, _, truncated in made.values())
        assert_equals_transformers(reference(spec), prompts, made, temperature=0)
    longest = max(made, key=lambda row: len(prompts[row].token_ids))
    theirs = reference(spec).generate(
        torch.tensor([prompts[longest].token_ids]),
        attention_mask=torch.ones(1, max(PROMPT_LENGTHS), dtype=torch.int64),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=VOCABULARY,  # no token, so that none ends the row
        pad_token_id=0,
    )
    assert made[longest][0].tolist() == theirs[0, max(PROMPT_LENGTHS) :].tolist()


@pytest.mark.parametrize("family", sorted(BY_LENGTH))
def test_sampling_agrees_with_scoring_under_one_length(roles, world_size, family):
    spec, prompts = Spec(family), draw_prompts()
    for layout in telling_layouts(world_size):
        model, grid = roles.build(spec, layout)
        for longest in (ORIGINAL, max(PROMPT_LENGTHS) + NEW_TOKENS):
            with model.rotary_angles.fixed(longest):
                made = generate(model.eval(), grid, prompts)
                teacher = Teacher(model, grid, micro_batch_tokens=64)
                rows = [torch.tensor(prompts[row].token_ids) for row in sorted(made)]
                scored = teacher.score(rows, [made[row][0] for row in sorted(made)])
            for row, log_probs, entropies in zip(sorted(made), scored.log_probs, scored.entropies, strict=True):
                torch.testing.assert_close(made[row][1], log_probs, rtol=0, atol=2e-5)
                torch.testing.assert_close(made[row][2], entropies, rtol=0, atol=2e-5)
            if longest <= ORIGINAL:  # what transformers says of rows that stay within the original context
                short = {row: made[row] for row in made if len(prompts[row].token_ids) + NEW_TOKENS <= ORIGINAL}
                assert short
                for row, (tokens, log_probs, *_) in short.items():
                    logits = hf_response_logits(reference(spec), torch.tensor(prompts[row].token_ids), tokens)
                    expected = log_prob_and_entropy(logits, tokens)[0]
                    torch.testing.assert_close(log_probs.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "family, temperature, top_p",
    [("llama", 1.0, 1.0), ("qwen3", 0.8, 0.9), ("mistral-window", 0.8, 0.9), ("llama3-tied", 1.3, 0.7)],
)
def test_samples_equal_transformers_in_every_layout(roles, world_size, family, temperature, top_p):
    spec, prompts, expected = Spec(family), draw_prompts(), None
    options = {"temperature": temperature, "top_p": top_p}
    for layout in telling_layouts(world_size, contexts=(1, 2, 4) if "window" in family else (1, 2)):
        model, grid = roles.build(spec, layout)
        made = generate(model.eval(), grid, prompts, **options)
        if expected is None:
            expected = made
            assert_equals_transformers(reference(spec), prompts, made, **options)
        assert_same(made, expected, f"{layout}")
    distinct = {token for tokens, *_ in expected.values() for token in tokens.tolist()}
    assert len(distinct) > 30  # neither stuck nor greedy


@pytest.mark.parametrize("which, temperature, top_p", [(0, 1.0, 1.0), (-1, 0.8, 0.9)])
def test_samples_do_not_depend_on_batch_or_company(roles, world_size, which, temperature, top_p):
    prompts, options = draw_prompts(), {"temperature": temperature, "top_p": top_p}
    model, grid = roles.build(Spec("mistral-window"), layouts(world_size)[which])
    expected = generate(model.eval(), grid, prompts, **options)
    for size, every in ((1, 0), (3, 0), (3, 5), (0, NEW_TOKENS)):
        made = generate(model, grid, prompts, batch_size=size, sync_every=every, **options)
        assert_same(made, expected, f"{size} slots, looked at every {every} tokens")
    # Other company, another order, and with one row at least one replica that has none.
    for rows in ([5, 1, 4], [2]):
        part = generate(model, grid, prompts, rows, **options)
        assert_same(part, {row: expected[row] for row in rows}, f"rows {rows}")


def test_seed_step_and_row_change_the_sample(roles, world_size):
    prompts = draw_prompts((4,)) * 2
    model, grid = roles.build(Spec("llama"), Layout(num_ranks=world_size))
    engine = MegatronEngine(model.eval(), grid)
    samples = [
        tuple(tokens.tolist())
        for seed, step in ((1, 0), (1, 1), (2, 0))
        for tokens in engine.generate(
            prompts, [0, 1], sampling=Sampling(max_new_tokens=8, seed=seed), step=step
        ).responses
    ]
    assert len(set(samples)) == 6  # same prompt throughout


def cut(made, stop_ids, limit):
    """What rows generated without stop tokens are with them: cut after the first stop token, or at the limit."""
    expected = {}
    for row, (tokens, log_probs, entropies, _) in made.items():
        stops = [i + 1 for i, token in enumerate(tokens.tolist()) if token in stop_ids and i < limit]
        end = min(stops, default=limit)
        expected[row] = (tokens[:end], log_probs[:end], entropies[:end], not stops)
    return expected


def test_stop_tokens_end_their_row_alone(roles, world_size, monkeypatch):
    moved = []
    real = KVCache.move
    monkeypatch.setattr(KVCache, "move", lambda cache, *where: (moved.append(where), real(cache, *where))[1])
    prompts = draw_prompts(tuple(1 + (5 * i) % 13 for i in range(12)))
    variants = itertools.cycle([(2, 3), (5, 0), (0, 5)])
    for layout in layouts(world_size):
        model, grid = roles.build(Spec("qwen3"), layout)
        whole = generate(model.eval(), grid, prompts)
        assert not moved  # nothing finishes without stop tokens
        # Tokens at which most rows end early, at different positions, and some do not.
        stop_ids = {int(whole[row][0][position]) for row, position in enumerate((0, 2, 2, 3, 4, 6, 8))}
        expected = cut(whole, stop_ids, NEW_TOKENS)
        ends = sorted(len(tokens) for tokens, *_ in expected.values())
        assert len({*ends}) > 4 and ends[6] < NEW_TOKENS and any(truncated for *_, truncated in expected.values())
        assert_same(generate(model, grid, prompts, stop_ids=stop_ids), expected, f"{layout}")
        # The last rows take the place of those that have ended; a replica with few rows may never get there.
        assert moved or grid.row_replicas > 2
        size, every = next(variants)
        made = generate(model, grid, prompts, stop_ids=stop_ids, batch_size=size, sync_every=every)
        assert_same(made, expected, f"{layout}, {size} slots, looked at every {every} tokens")
        # A stop token in the last place ends the row; that is no truncation.
        expected = cut(whole, stop_ids, ends[3])
        assert any(len(tokens) == ends[3] and not truncated for tokens, _, _, truncated in expected.values())
        made = generate(model, grid, prompts, stop_ids=stop_ids, max_new_tokens=ends[3])
        assert_same(made, expected, f"{layout}, {ends[3]} tokens")
        moved.clear()


def test_decode_steps_as_graphs(roles, world_size, monkeypatch):
    """Each stage's part, with the collectives of tensor ranks inside and messages between stages outside."""
    graphs, prompts = pretend_graphs(monkeypatch), draw_prompts()
    monkeypatch.setattr(packed_linear, "_usable", lambda weight: False)
    monkeypatch.setattr(engines, "uses_graphs", lambda *args, on_gpu: False)
    for layout in layouts(world_size, tensors=(2,)):  # with and without a pipeline, where there are ranks for it
        model, grid = roles.build(Spec("qwen3"), layout)
        expected = generate(model.eval(), grid, prompts, sync_every=4, batch_size=3)
        with monkeypatch.context() as pretended:
            pretended.setattr(engines, "uses_graphs", lambda *args, on_gpu: True)
            graphs.clear()
            made = generate(model, grid, prompts, sync_every=4, batch_size=3)
        assert_same(made, expected, f"{layout}")
        assert graphs and all(graph.replays for graph in graphs), layout


def greedy_by_transformers(folder, texts, new_tokens):
    """Prompts and greedy continuations of a Hugging Face folder in float32, one unpadded row at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    pairs = []
    for text in texts:
        prompt = tokenizer(text, return_tensors="pt").input_ids
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=model.config.vocab_size,  # no token, so that none ends the row
            pad_token_id=0,
        )
        pairs.append((prompt[0].tolist(), out[0, prompt.shape[1] :].tolist()))
    return pairs


@pytest.mark.skipif(
    not (SMOLLM2 / "config.json").is_file(),
    reason=f"no SmolLM2 in {SMOLLM2}: run `make quickstart`, or set FIRE_SMOLLM2=DIR to its Hugging Face folder",
)
def test_greedy_smollm2_equals_transformers(roles, world_size, world):
    texts = (
        "The capital of France is",
        "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n",
        "def fibonacci(n):\n",
        "Water boils at a lower temperature on a mountain because",
    )
    # A model of this size takes seconds on every rank.
    path, pairs, length = roles.folder / "smollm2", None, 32 if world_size == 2 else 12
    if world.is_main:
        hf_to_megatron(SMOLLM2, path)
        pairs = greedy_by_transformers(SMOLLM2, texts, length)
    pairs = share(pairs)
    prompts = [Prompt(i, "math", tuple(prompt), "") for i, (prompt, _) in enumerate(pairs)]
    tensor = 3 if world_size % 3 == 0 else 1  # 9 query heads, 3 key/value heads
    shapes = [Layout(tensor=tensor, pipeline=world_size // tensor, num_ranks=world_size)]
    if world_size == 2:  # a model of this size takes seconds on every rank
        shapes.append(Layout(num_ranks=2))
    for layout in shapes:
        model, grid = roles.build(path, layout)
        made = generate(model.eval(), grid, prompts, temperature=0, max_new_tokens=length)
        assert [made[row][0].tolist() for row in range(len(texts))] == [continuation for _, continuation in pairs]


@pytest.mark.two_ranks
def test_finished_rows_are_handed_over_while_others_are_sampled(roles, world_size):
    spec, prompts = Spec("qwen3"), draw_prompts()
    for layout in layouts(world_size):
        model, grid = roles.build(spec, layout)
        mine, events = grid.own_rows(len(prompts)), []
        made = MegatronEngine(model, grid).generate(
            [prompts[i] for i in mine],
            mine,
            sampling=Sampling(max_new_tokens=NEW_TOKENS, seed=SEED, batch_size=1),
            step=STEP,
            progress=lambda tokens: events.append("sampled"),  # noqa: B023
            finished=lambda ids, responses: events.append((ids, responses)),  # noqa: B023
            group_size=1,
        )
        groups = [event for event in events if event != "sampled"]
        assert [ids for ids, _ in groups] == [[row] for row in mine], "each once, one batch after the other"
        for (_, (response,)), whole in zip(groups, made.responses, strict=True):
            assert torch.equal(response, whole)
        if len(mine) > 1:
            assert events.index(groups[0]) < len(events) - 1 - events[::-1].index("sampled"), layout
