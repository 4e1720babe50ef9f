"""Sampling: milliseconds a token against the time to read weights and cache, and against transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch

from fire_megatron.platform.device import device_memory, peak_memory_mb, release_cached_memory, reset_peak_memory
from fire_megatron.rollout.engine import MegatronEngine
from fire_megatron.rollout.sampling import Sampling
from gpu_checks import measure
from gpu_checks.check import Context, Findings, need, rounded, said
from gpu_checks.models import CONFIGS, Here, alone, parameter_bytes, prompts_of, ragged


def model_name(context: Context) -> str:
    """What samples."""
    return "Qwen3-4B" if context.gpu else "toy"


def new_tokens(context: Context) -> int:
    """Of every answer: none ends early, so that all rows are there to the last token."""
    return 128 if context.gpu else 8


def lengths(context: Context, rows: int) -> list[int]:
    """Of the prompts."""
    return ragged(rows, 16, 256) if context.gpu else ragged(rows, 2, 20)


def rows_of(context: Context, rows: int) -> int:
    """As asked for on a GPU, an eighth of them on a CPU."""
    return rows if context.gpu else rows // 8


def decode(context: Context, rows: int) -> Findings:
    """Our engine. Args: rows: prompts."""
    rows, tokens = rows_of(context, rows), new_tokens(context)
    with alone(context) as here:
        device = here.world.device
        bandwidth = measure.copy_gb_s(device)
        release_cached_memory(device)
        model = here.model(model_name(context), dtype=here.dtype)
        weights = parameter_bytes(model)
        cache = _cache_bytes(context, rows)
        generate = _Generation(here, model, rows)
        reset_peak_memory(device)
        first = measure.seconds(lambda: generate(tokens), device, times=1, first=True)
        memory = [device_memory(device)]
        peak = peak_memory_mb(device) if context.gpu else None
        whole = measure.seconds(lambda: generate(tokens), device, times=2, first=True)
        memory.append(device_memory(device))
        prefill = measure.seconds(lambda: generate(1), device, times=2)
        work = _host_work_a_token(generate, here)
    step, floor = _ms_a_token(whole, prefill, tokens), (weights + cache) / bandwidth / 1e6
    figures = {
        "rows": rows,
        "new_tokens": tokens,
        "prompt_tokens": sum(lengths(context, rows)),
        "ms_a_token": rounded(step),
        "floor_ms": rounded(floor),
        "times_floor": None if step is None else rounded(step / floor),
        "tokens_per_second": rounded(rows * tokens / whole),
        "seconds": rounded(whole),
        "first_seconds": rounded(first),
        "prefill_seconds": rounded(prefill),
        "peak_mb": None if peak is None else round(peak),
        "allocated_growth_mb": _growth(memory, "allocated"),
        "reserved_growth_mb": _growth(memory, "reserved"),
        **work,
    }
    problems = []
    if (figures["allocated_growth_mb"] or 0) > 64:
        problems.append(f"a generation leaves {figures['allocated_growth_mb']} MB behind")
    told = (
        f"{rows} x {tokens} tokens: {said(figures['ms_a_token'])} ms a token, {said(figures['times_floor'])} times the "
        f"reading of weights and cache; {figures['tokens_per_second']} tokens/s, {figures['seconds']} s, first "
        f"{figures['first_seconds']}; a token: {said(work['launches'], 'launches')}, {said(work['graphs'], 'graphs')}, "
        f"{said(work['waits'], 'waits')}, {said(work['operators'], 'operators')}; growth "
        f"{said(figures['allocated_growth_mb'], 'MB')}"
    )
    return Findings(told, figures, problems)


def _ms_a_token(whole: float, prefill: float, tokens: int) -> float | None:
    """Of a decode step, from seconds of all tokens and of the first; None where noise is larger than that."""
    return 1e3 * (whole - prefill) / (tokens - 1) if whole > prefill else None


class _Generation:
    """Samples answers of so many tokens from the same prompts, as steps of a run do: with memory for keys and values,
    and graphs, that stay from one to the next of as many tokens."""

    def __init__(self, here: Here, model: torch.nn.Module, rows: int) -> None:
        self._prompts = prompts_of(lengths(here.context, rows), CONFIGS[model_name(here.context)]["vocab_size"])
        self._engine, self._tokens = MegatronEngine(model, here.grid, keep_cache=True), 0

    def __call__(self, tokens: int) -> None:
        if self._tokens != tokens:
            self._engine.release()
        self._tokens, sampling = tokens, Sampling(max_new_tokens=tokens, seed=1)
        self._engine.generate(self._prompts, range(len(self._prompts)), sampling=sampling, step=0)


def _cache_bytes(context: Context, rows: int) -> float:
    """Of keys and values that a decode step reads on average."""
    shape, tokens = CONFIGS[model_name(context)], sum(lengths(context, rows)) + rows * new_tokens(context) / 2
    return 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"] * 2 * tokens


def _growth(memory: list, name: str) -> int | None:
    """MB more after the later generations than after the first."""
    before, after = memory
    return None if before is None else round((getattr(after, name) - getattr(before, name)) / 2**20)


def _host_work_a_token(generate: Callable[[int], None], here: Here) -> dict[str, float | None]:
    """What the host does for a step of all rows: of many less that of few, of both once all their graphs are there: a
    function that a generation runs once is captured in the second."""
    many, few = (33, 17) if here.context.gpu else (3, 2)
    counted: list[Counter[str]] = []
    for tokens in (many, few):
        generate(tokens), generate(tokens)
        counted.append(measure.events(lambda tokens=tokens: generate(tokens), here.world.device))
    more, less = (measure.host_work(counts) for counts in counted)
    figures = {name: (more[name] - less[name]) / (many - few) for name in more}
    seen = here.context.gpu and more["launches"] + more["graphs"] > 0  # the profiler may not be allowed to look
    return {name: rounded(value) if seen or name == "operators" else None for name, value in figures.items()}


def decode_peer(context: Context, rows: int, compiled: bool) -> Findings:
    """``generate`` of transformers with a static cache, on a model of the same shape.

    Args:
        rows: prompts.
        compiled: whether its decode step goes through torch.compile, as it does by default.
    """
    need("transformers")
    with alone(context) as here:
        return _measured_peer(here, rows_of(context, rows), compiled)


def _measured_peer(here: Here, rows: int, compiled: bool) -> Findings:
    context, tokens, device = here.context, new_tokens(here.context), here.world.device
    model = _peer_model(here)
    ids, mask = _left_padded(context, rows)
    ids, mask = ids.to(device.torch_device), mask.to(device.torch_device)

    def generate(tokens: int) -> None:
        model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, top_k=0,
            pad_token_id=0, cache_implementation="static", disable_compile=not compiled,
        )  # fmt: skip

    first = measure.seconds(lambda: generate(tokens), device, times=1, first=True)
    whole = measure.seconds(lambda: generate(tokens), device, times=1 + context.gpu, first=True)
    prefill = measure.seconds(lambda: generate(1), device, times=1)
    step = _ms_a_token(whole, prefill, tokens)
    ours = context.earlier(f"decode_{rows if context.gpu else 8 * rows}").get("ms_a_token")
    figures = {
        "rows": rows,
        "ms_a_token": rounded(step),
        "tokens_per_second": rounded(rows * tokens / whole),
        "first_seconds": rounded(first),
        "seconds": rounded(whole),
        "ours_to_theirs": rounded(ours / step) if ours and step else None,
    }
    told = (
        f"{rows} x {tokens} tokens: {said(figures['ms_a_token'])} ms a token, {figures['tokens_per_second']} tokens/s, "
        f"the first time {figures['first_seconds']} s; ours to that {said(figures['ours_to_theirs'])}"
    )
    return Findings(told, figures)


def _peer_model(here: Here) -> torch.nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with here.world.device.torch_device:
            values = {key: value for key, value in CONFIGS[model_name(here.context)].items() if key != "model_type"}
            return Qwen3ForCausalLM(Qwen3Config(**values, eos_token_id=None, bos_token_id=None)).eval()
    finally:
        torch.set_default_dtype(before)


def _left_padded(context: Context, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    prompts = prompts_of(lengths(context, rows), CONFIGS[model_name(context)]["vocab_size"])
    longest = max(len(prompt.token_ids) for prompt in prompts)
    ids, mask = torch.zeros(rows, longest, dtype=torch.int64), torch.zeros(rows, longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
        mask[row, longest - len(prompt.token_ids) :] = 1
    return ids, mask
