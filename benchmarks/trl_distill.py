#!/usr/bin/env python3
"""TRL's on-policy distillation of one teacher into one student, timed; step.py runs this.

    python3.11 -m venv /tmp/trl-env && /tmp/trl-env/bin/pip install torch==2.13.0 trl==1.16.0
    HF_HUB_OFFLINE=1 /tmp/trl-env/bin/python benchmarks/trl_distill.py --student HF_DIR --teacher HF_DIR \
        --prompts PROMPTS.jsonl --rollouts 8 --new-tokens 64 --steps 4 --threads 2

Prints one JSON line: seconds of each optimizer step (generate, teacher forward, student forward and
backward, AdamW), generated tokens of each step, and peak MB: resident, or of tensors on the GPU. Reverse KL (beta 1) on
the full vocabulary, no gradient checkpointing.
"""

import argparse
import json
import resource
import tempfile
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--prompts", required=True, help="JSONL with a 'problem' field")
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--micro-batch-size", type=int, default=0, help="answers in one pass; 0 takes all at once")
    parser.add_argument("--max-prompt-chars", type=int, default=350)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights")
    args = parser.parse_args()
    step_seconds, step_tokens = _train(args)
    print(
        json.dumps(
            {
                "peer": "trl",
                "step_seconds": [round(s, 2) for s in step_seconds],
                "tokens_per_step": step_tokens,
                "peak_mb": round(_peak_mb(args.device)),
            }
        )
    )


def _peak_mb(device: str) -> float:
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    import torch

    return torch.cuda.max_memory_allocated() / 2**20


def _train(args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds and generated tokens of each step."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    torch.set_num_threads(args.threads)
    micro = args.micro_batch_size or args.rollouts
    with open(args.prompts) as lines:
        problems = [json.loads(line)["problem"] for line in lines]
    problems = [p for p in problems if len(p) < args.max_prompt_chars][: args.rollouts * args.steps]
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": p}]} for p in problems])

    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    step_seconds: list[float] = []
    step_tokens: list[float] = []

    class Stopwatch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            wait()
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            wait()
            step_seconds.append(time.perf_counter() - self.start)
            step_tokens.append(trainer._metrics["train"]["completions/mean_length"][-1] * args.rollouts)

    with tempfile.TemporaryDirectory() as out:
        config = DistillationConfig(
            output_dir=out,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=args.rollouts // micro,
            max_steps=args.steps,
            max_completion_length=args.new_tokens,
            learning_rate=1e-5,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            beta=1.0,
            save_strategy="no",
            report_to=[],
            logging_steps=1000,
            use_cpu=args.device == "cpu",
            bf16=args.dtype == "bfloat16",
            fp16=False,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": args.dtype},
            teacher_model_init_kwargs={"dtype": args.dtype},
            disable_tqdm=True,
        )
        trainer = DistillationTrainer(
            model=args.student, teacher_model=args.teacher, args=config, train_dataset=dataset, callbacks=[Stopwatch()]
        )
        trainer.train()
    return step_seconds, step_tokens


if __name__ == "__main__":
    main()
