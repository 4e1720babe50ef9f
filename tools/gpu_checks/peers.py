"""A whole step against TRL's, by the benchmark of the repository."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import torch

from gpu_checks.check import PROJECT, Context, Findings, need, rounded
from gpu_checks.commands import command
from gpu_checks.models import CONFIGS, Here, alone

_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def step_against_trl(context: Context) -> Findings:
    """``benchmarks/step.py``: seconds and memory of a step, ours and TRL's, same models, prompts and tokens."""
    need("trl", "transformers")
    with alone(context) as here:  # what is set at a start, of the allocator above all, is set before a GPU is used
        for name in ("student", "teacher"):
            _hf_model(here, context.folder / "peer_hf" / name)
    rows, tokens = (16, 128) if context.gpu else (2, 4)
    flags = {
        "--student": context.folder / "peer_hf" / "student",
        "--teacher": context.folder / "peer_hf" / "teacher",
        "--prompts": PROJECT / "recipes" / "data" / "math.jsonl",
        "--peer-python": sys.executable,
        "--device": context.device,
        "--dtype": "bfloat16" if context.gpu else "float32",
        "--rollouts": rows,
        "--new-tokens": tokens,
        "--micro-batch-size": rows // 2,
        "--steps": 4 if context.gpu else 2,
    }
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        command("benchmarks/step.py", *(str(part) for pair in flags.items() for part in pair))
    print(printed.getvalue())
    sides = json.loads(printed.getvalue().splitlines()[-1])
    ours, peer = sides["ours"], sides["trl 1.16"]
    figures = {
        "step_s": rounded(ours["step_s"]),
        "trl_step_s": rounded(peer["step_s"]),
        "ratio": rounded(ours["step_s"] / peer["step_s"]),
        "peak_mb": rounded(ours["peak_mb"]),
        "trl_peak_mb": rounded(peer["peak_mb"]),
        "memory_ratio": rounded(ours["peak_mb"] / peer["peak_mb"]),
        **{f"{phase}_s": rounded(ours[f"{phase}_s"]) for phase in ("rollout", "teacher", "update")},
    }
    told = (
        f"{rows} x {tokens} tokens: {figures['step_s']} s a step, {figures['ratio']} of TRL's; {figures['peak_mb']} "
        f"MB, {figures['memory_ratio']} of TRL's"
    )
    return Findings(told, figures)


def _hf_model(here: Here, folder: Path) -> None:
    """A Hugging Face folder with random weights and the tiny models' tokenizer, whose template is the bare text."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    context = here.context
    tokenizer = AutoTokenizer.from_pretrained(context.folder / "tiny_hf" / "student")
    tokenizer.chat_template = _TEMPLATE
    values = {k: v for k, v in CONFIGS["Qwen3-0.6B" if context.gpu else "toy"].items() if k != "model_type"}
    config = Qwen3Config(**values, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    torch.manual_seed(0 if folder.name == "student" else 1)
    with here.world.device.torch_device:
        model = Qwen3ForCausalLM(config)
    model.to(torch.bfloat16 if context.gpu else torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
