"""The rule book: what each rule refuses, alone, with key, value and fix; and what passes."""

import os

import pytest
from rules import BARE_GPU, CPU, EXPERTS, FILE, GPU, MIXED, TWO, Tokens, Values, ask, fp8, hooked, one_problem, untried

PASSES: dict[str, Values] = {
    "as it is": {},
    "one rank": {"world_size": 1},
    "seven ranks": {"world_size": 7},
    "a large layout": {
        "student.parallel": {"tensor": 4, "pipeline": 4, "sequence": True},
        "teachers.math.parallel": {"tensor": 2, "pipeline": 8},
        "teachers.code.parallel": {"context": 2, "tensor": 2},
        "teachers.code.megatron": {"cp_comm_type": "a2a"}, "teachers.code.megatron_untested": True,
        "teachers.code.layer_spec": "te",
        "optimizer.micro_batch_tokens": 4096,
        "evaluation": {"every": 2, "prompts": [{"path": FILE, "label": "sql"}]},
        "checkpoint.dir": "a/b",
        "world_size": 64,
    },
    "roles apart": {
        "student.ranks": "0-1", "student.parallel.tensor": 2, "student.offload": True,
        "teachers.math.ranks": "1-3", "teachers.math.parallel.pipeline": 3, "teachers.math.offload": True,
        "teachers.code.ranks": "2-2", "rollout.group_size": 2, "world_size": 4,
    },
    "a multiple of every role's ranks": {
        "student.parallel": {"tensor": 2, "pipeline": 2}, "teachers.math.parallel.context": 3, "world_size": 12
    },
    "experts over a stage": {
        "student/config.json": EXPERTS | {"num_experts": 8},
        "student.parallel": {"tensor": 2, "pipeline": 2, "expert": 4}, "world_size": 16,
    },
    "fp8": fp8(), "fp8 of a null dtype": fp8() | {"student.precision.dtype": None},
    "fp8 delayed": fp8(recipe="delayed", amax_history=16, amax_algorithm="most_recent", margin=1),
    "fp8 blockwise": fp8(recipe="blockwise", param_gather=True, first_last_bf16=1),
    "fp8 mxfp8": fp8(recipe="mxfp8", format="e4m3"),
    "fp8 of a teacher": fp8("teachers.math", param_gather=True) | {"optimizer.distributed": False},
    "fp8 on a GPU": {**fp8(device="auto"), "known": {"machine": GPU}},
    "fp8 emulated": {**fp8(device="auto", emulate=True), "known": {"machine": CPU}},
    "a hook of one's own": hooked("mine") | {"run.plugins": ["my_hooks"]},
    "a hook that is registered": hooked("mine", hooks=("filter", "mine")) | {"run.plugins": ["my_hooks"]},
    "micro-batches by rows": {"loss": TWO, "optimizer.micro_batch_size": 4},
    "the same tokenizers": {"known": {"tokenizer": Tokens(), "fingerprints": {"student": "a", "teachers.math": "a"}}},
    "a system prompt": {"data.system_prompt": "Be brief.", "known": {"tokenizer": Tokens(has_chat_template=True)}},
    "one teacher a row": {"loss": {"estimator": "topk"}},
    "several teachers a row": {"loss": {"estimator": "full"}, "known": {"mixed": ("code+math",)}},
    "megatron": {"student.megatron": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}},
    "a null field of megatron": {
        "student.megatron": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1,
                             "recompute_modules": None},
    },
    "parts that nobody has tried": {
        "student/config.json": EXPERTS, "student.megatron_untested": True, "known": {"machine": GPU},
        "student.megatron": {"recompute_granularity": "selective", "recompute_modules": ["moe_act", "layernorm"]},
    },
    "a field of a newer release": {"student.megatron": {"warp_drive": 9}, "student.megatron_untested": True},
    "megatron for experts": {
        "student/config.json": EXPERTS,
        "student.megatron": {
            "moe_aux_loss_coeff": 1e-3, "moe_z_loss_coeff": 1, "moe_router_load_balancing_type": "aux_loss"
        },
        "teachers.math/config.json": EXPERTS,
        "teachers.math.megatron": {"moe_grouped_gemm": False, "moe_router_dtype": "fp64"},
        "teachers.math.megatron_untested": True,
        "known": {"machine": BARE_GPU},
    },
    "values of types that megatron-core will refuse": fp8() | {
        "student.megatron": {"recompute_granularity": "selective", "recompute_modules": 5}
    },
    "a plan for a CPU recipe on GPUs": {**fp8(device="cpu"), "known": {"machine": GPU}},
}  # fmt: skip


@pytest.mark.parametrize("name", PASSES)
def test_what_passes(values: Values, name: str) -> None:
    ask(values, PASSES[name])


REFUSED: list[tuple[Values, str]] = [
    # labels, files, chat templates
    (
        {"teachers.code.labels": ["python", "math"]},
        "teachers.code.labels: 'math' is claimed by teachers.math as well; a label belongs to one teacher",
    ),
    ({"teachers.code.labels": ["a", "sql", "a"]}, "teachers.code.labels: 'a' is claimed twice by it"),
    ({"data.train.0.label": "maths"}, "data.train.0.label: no teacher takes 'maths'; did you mean math?"),
    (
        {"evaluation.prompts": [{"path": FILE, "label": "code"}]},
        "evaluation.prompts.0.label: no teacher takes 'code'; the labels with a teacher are math, python, sql",
    ),
    ({"data.train.1.path": "nowhere.jsonl"}, "data.train.1.path: nowhere.jsonl does not exist (looked in "),
    ({"data.train.1.path": "/tmp"}, "data.train.1.path: /tmp is a folder; give a file"),
    ({"run.dir": FILE + "/run"}, "prompts.jsonl is a file; choose another folder"),
    ({"checkpoint": {"dir": FILE}}, "checkpoint.dir: "),
    ({"run.dir": "~/runs/a"}, f"run.dir: ~/runs/a: ~ is not replaced here; write {os.path.expanduser('~/runs/a')}"),
    (
        {"data.system_prompt": "Be brief.", "data.chat_template": "off"},
        "data.system_prompt: needs a chat template and data.chat_template is off; use auto or on",
    ),
    (
        {"data.chat_template": "on", "known": {"tokenizer": Tokens()}},
        "data.chat_template: on, but the tokenizer has no chat template; use off",
    ),
    (
        {"data.system_prompt": "Be brief.", "known": {"tokenizer": Tokens()}},
        "data.system_prompt: needs a chat template, and the tokenizer has none; leave it out, or use a mo",
    ),
    (
        {"loss.estimator": "topk", "known": {"mixed": ("code+math", "math+code")}},
        "loss.estimator: topk takes one teacher a row, but 2 rows name several, whose top-k tokens are not the same "
        "(the first: code+math); use full, or give these rows one label",
    ),
    (
        {"evaluation.benchmarks": [{"path": FILE}, {"path": FILE}]},
        "evaluation.benchmarks.1.name: its name 'prompts' is taken by evaluation.benchmarks.0.name; results "
        "and samples go by name, so give another",
    ),
    (
        {"evaluation.benchmarks": [{"path": FILE, "name": "math"}]},
        "evaluation.benchmarks.0.name: 'math' is a teacher's; give another name",
    ),
    # models
    ({"student.checkpoint": "no/such"}, "student.checkpoint: no/such does not exist (looked in "),
    ({"student.checkpoint": FILE}, "prompts.jsonl is a file; give the folder of a converted checkpoint"),
    ({"student/config.json": {"model_type": "mamba"}}, "config.json: model_type is 'mamba'; supported: llama, "),
    (
        {"teachers.math/config.json": {"max_position_embeddings": 1039}},
        "rollout.max_new_tokens: 16 after prompts of up to 1024 tokens (data.max_prompt_tokens) exceeds the 1039 "
        "positions of teachers.math; lower one of them",
    ),
    (
        {"evaluation": {"max_new_tokens": 1025, "prompts": [{"path": FILE}]}},
        "evaluation.max_new_tokens: 1025 after prompts",
    ),
    (
        {"run.device": "cpu", "teachers.math.layer_spec": "te"},
        "teachers.math.layer_spec: te needs Transformer Engine on a GPU and run.device is cpu; use auto or local",
    ),
    ({"student.layer_spec": "te", "known": {"machine": BARE_GPU}}, "cannot be used (not installed); use auto"),
    (
        {"known": {"tokenizer": Tokens(301)}, "student/config.json": {"vocab_size": 400},
         "teachers.code/config.json": {"vocab_size": 400}},
        "teachers.math.checkpoint: its vocabulary of 256 does not hold the tokenizer's 301 tokens",
    ),
    (
        {"known": {"fingerprints": {"student": "a", "teachers.math": "b", "teachers.code": "a"}}},
        "teachers.math.checkpoint: its tokenizer differs from the student's (",
    ),
    ({"loss": {"estimator": "topk", "top_k": 257}}, "loss.top_k: 257 exceeds the vocabulary of 256; lower it"),
    # layout
    (
        {"student.parallel.tensor": 3},
        "student.parallel.tensor: 3 does not divide the model's 8 heads nor its 4 key/value heads nor its 64 rows of "
        "the MLP; choose a number that divides 8 and 4 and 64",
    ),
    (
        {"teachers.math/config.json": {"num_attention_heads": 12, "head_dim": 8, "intermediate_size": 96},
         "teachers.math.parallel.tensor": 6},
        "teachers.math.parallel.tensor: 6 does not divide the model's 4 key/value heads; choose a number that divides "
        "12 and 4 and 96, or a multiple of the 4 key/value heads that divides the others",
    ),
    (
        {"teachers.math/config.json": {"num_attention_heads": 12, "num_key_value_heads": 1, "head_dim": 8,
         "intermediate_size": 96}, "teachers.math.parallel.tensor": 12, "world_size": 12},
        "teachers.math.parallel.tensor: 12 does not divide the model's 112 rows of queries, keys and values; choose",
    ),
    (
        {"teachers.math/config.json": EXPERTS | {"moe_intermediate_size": 33}, "teachers.math.parallel.tensor": 2},
        "teachers.math.parallel.tensor: 2 does not divide the model's 33 rows of an expert's MLP",
    ),
    ({"student/config.json": MIXED, "student.parallel.tensor": 2}, "does not divide the model's 65 rows of the MLP"),
    ({"student.parallel.sequence": True}, "student.parallel.sequence: true needs student.parallel.tensor above 1"),
    ({"student.parallel.pipeline": 5}, "student.parallel.pipeline: 5 stages for a model of 4 layers; lower it"),
    ({"student.parallel.expert": 2}, "student.parallel.expert: 2, but the model has no experts; leave it 1"),
    (
        {"teachers.math/config.json": EXPERTS, "teachers.math.parallel.expert": 4},
        "teachers.math.parallel.expert: 4 does not divide the model's 6 experts; choose",
    ),
    (
        {"student/config.json": EXPERTS, "student.parallel": {"tensor": 2, "sequence": False}},
        "student.parallel.sequence: false, but experts train with parallel.tensor 2 only with sequence parallelism",
    ),
    (
        {"student/config.json": EXPERTS | {"num_experts": 8},
         "student.parallel": {"tensor": 2, "pipeline": 2, "expert": 4}, "world_size": 8},
        "student.parallel.expert: 4 does not divide the 2 ranks that share the experts of a pipeline stage",
    ),
    (
        {"teachers.code.parallel": {"pipeline": 3}, "world_size": 4},
        "teachers.code.parallel: tensor 1 x pipeline 3 x context 1 = 3 ranks a copy of the model, which does not "
        "divide the run's 4; start a multiple of 3 ranks or lower one of them",
    ),
    (
        {"teachers.math.ranks": "1-3", "teachers.math.parallel.tensor": 2, "world_size": 4},
        "which does not divide the 1-3 of teachers.math.ranks: 3; give a multiple of 2 ranks or lower one of them",
    ),
    (
        {"teachers.math.ranks": "2-4", "world_size": 4},
        "teachers.math.ranks: 2-4 reaches beyond the run's 4 ranks (0-3)",
    ),
    (
        {"teachers.math.ranks": "3-2", "world_size": 4},
        "teachers.math.ranks: 3-2 ends before it starts; write first-last",
    ),
    ({"student.ranks": "1-3", "world_size": 4}, "student.ranks: 1-3 does not start at rank 0, which writes metrics"),
    (
        {"student.ranks": "0-0", "teachers.math.ranks": "1-1", "teachers.code.ranks": "1-1", "world_size": 4},
        "student.ranks: 2 of the run's 4 ranks hold no role (2, 3); give them to the student or a teacher",
    ),
    *(
        (
            {"student.ranks": "0-1", "teachers.math.ranks": "2-2", "teachers.code.ranks": "3-3",
             f"{role}.offload": True, "world_size": 4},
            f"{role}.offload: true, but no other role is on its ranks",
        )
        for role in ("student", "teachers.math")
    ),
    ({"rollout.group_size": 2, "world_size": 4}, "rollout.group_size: 2, but every teacher shares the student's ranks"),
    (
        untried("cp_comm_type", "all_gather"),
        "student.megatron.cp_comm_type: 'all_gather' has no effect, since student.parallel.context is 1; leave it",
    ),
    (
        untried("cp_comm_type", "all_gather") | {"student.parallel.context": 2, "student.layer_spec": "local"},
        "'all_gather' is read by Transformer Engine's layers and student.layer_spec is local; leave it out",
    ),
    (
        untried("cp_comm_type", "a2a", "teachers.code") | {"teachers.code.parallel": {"context": 4, "tensor": 2}},
        "teachers.code.megatron.cp_comm_type: 'a2a' shares out the model's 4 key/value heads over tensor 2 x context 4 "
        "= 8 ranks, which does not divide them; use 'p2p' or 'all_gather'",
    ),
    (
        untried("cp_comm_type", "p2p") | {
            "student/config.json": {"model_type": "mistral", "sliding_window": 7}, "student.parallel.context": 2
        },
        "student.megatron.cp_comm_type: 'p2p' knows no sliding window, and the model's is 7 tokens; leave it out, or",
    ),
    (untried("cp_comm_type", "a2a+p2p"), "student.megatron.cp_comm_type: 'a2a+p2p' is not one of p2p, all_gather"),
    # FP8
    (fp8(first_last_bf16=2), "student.precision.fp8.first_last_bf16: 2 layers at each end of the model's 4, over 1"),
    (fp8("teachers.math", first_last_bf16=4), "teachers.math.precision.fp8.first_last_bf16: 4 layers at each end"),
    (
        fp8("teachers.math", first_last_bf16=3) | {"teachers.math.parallel.pipeline": 4},
        "over 4 pipeline stages; at most 2",
    ),
    (fp8("teachers.math", format="e4m3"), "format: has no effect, since formats differ in gradients and a teacher has"),
    (fp8() | {"student.precision.dtype": "float32"}, "student.precision.dtype: float32, but between FP8 products"),
    (fp8("teachers.math", recipe="delayed"), "teachers.math.precision.fp8.recipe: delayed takes its scales from"),
    (fp8(recipe="delayed", param_gather=True), "student.precision.fp8.param_gather: true with recipe delayed would"),
    (fp8(recipe="mxfp8", param_gather=True), "student.precision.fp8.param_gather: true with recipe mxfp8 has"),
    (fp8(param_gather=True) | {"optimizer.distributed": False}, "fp8.param_gather: true, but only the distributed opt"),
    (fp8(param_gather=True) | {"student.offload": True}, "FP8 weights cannot wait on the host (student.offload)"),
    (
        fp8(device="cpu"),
        "student.precision.fp8: needs Transformer Engine's layers on a GPU and run.device is cpu; change it, or set "
        "student.precision.fp8.emulate=true on a CPU",
    ),
    (fp8() | {"student.layer_spec": "local"}, "layers on a GPU and student.layer_spec is local; change it"),
    ({**fp8(device="auto"), "known": {"machine": BARE_GPU}}, "a GPU and Transformer Engine cannot be used (not ins"),
    (
        {**fp8(device="auto", recipe="mxfp8"), "known": {"machine": GPU}},
        "student.precision.fp8.recipe: 'mxfp8' does not work on this GPU (no Blackwell); take another recipe",
    ),
    (fp8(emulate=True), "student.precision.fp8.emulate: true is FP8 on a CPU and the run is on a GPU; leave it out"),
    ({**fp8(device="auto", emulate=True), "known": {"machine": GPU}}, "fp8.emulate: true is FP8 on a CPU"),
    (
        fp8(device="auto", emulate=True) | {"student.layer_spec": "te"},
        "student.precision.fp8.emulate: true, but student.layer_spec is te, whose layers round by themselves",
    ),
    (
        fp8("teachers.math")
        | {"teachers.math/config.json": {"intermediate_size": 96}, "teachers.math.parallel.tensor": 4},
        "teachers.math.precision.fp8.recipe: 'tensorwise' multiplies in blocks of 16, which does not divide the "
        "model's width of the MLP of 24 on each of 4 tensor-parallel ranks; lower teachers.math.parallel.tensor, take "
        "bf16, or another model",
    ),
    (
        fp8(recipe="mxfp8") | {"student.parallel.tensor": 4},
        "'mxfp8' multiplies in blocks of 32, which does not divide the model's query heads of 16 on each of 4 tensor-",
    ),
    # the loss's hooks, counts
    (
        hooked("filter", "reweigh"),
        "loss.hooks.1.name: no hook is named 'reweigh'; did you mean reweight? There are filter, reweight; a hook of "
        "your own needs its module in run.plugins",
    ),
    (
        hooked("mine", hooks=("filter", "mint")) | {"run.plugins": ["my_hooks"]},
        "loss.hooks.0.name: no hook is named 'mine'; did you mean mint? There are filter, mint; a hook of your own",
    ),
    (
        {"loss": TWO, "optimizer.micro_batch_tokens": 100},
        "loss.hooks.1.scope: 'microbatch', takes its statistics over micro-batches of optimizer.micro_batch_size "
        "answers, and optimizer.micro_batch_tokens is 100; use 'global', or set micro_batch_size instead",
    ),
    (
        hooked("filter", scopes=["microbatch"]) | {"optimizer.micro_batch_tokens": 100},
        "loss.hooks.0.scope: 'microbatch', takes its statistics over micro-batches",
    ),
    (
        hooked("filter", "mine", hooks=("filter", "mine"), scopes=["global", "microbatch"])
        | {"optimizer.micro_batch_tokens": 100, "run.plugins": ["my_hooks"]},
        "loss.hooks.1: the scope of mine, 'microbatch', takes its statistics over micro-batches",
    ),
    ({"optimizer.mini_batches": 5}, "optimizer.mini_batches: 5 updates from 4 answers a step"),
    (
        {"loss": {"clip": 0.3}},
        "loss.clip: has no effect with one update from each step's answers, where new and old probabilities",
    ),
    (
        {"optimizer.warmup_steps": 4},
        "optimizer.warmup_steps: 4 exceeds run.steps, 3, so the rate would never reach optimizer.lr; lower it",
    ),
    (
        {"data.label_key": "topic", "data.train.1.label": "sql"},
        "data.label_key: has no effect, since every file is given a label; leave it out, or the labels",
    ),
    (
        {"loss": {"mixture": "log_probs"}, "known": {"mixed": ()}},
        "loss.mixture: has no effect, since no row names several teachers; leave it out",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), REFUSED, ids=[f"{i}-{next(iter(c))}" for i, (c, _) in enumerate(REFUSED)])
def test_one_mistake_is_one_problem(values: Values, changes: Values, says: str) -> None:
    one_problem(values, changes, says)
