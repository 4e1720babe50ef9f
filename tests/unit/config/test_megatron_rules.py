"""What is refused of a role's ``megatron``, alone, with key, value and fix."""

import pytest
from rules import BARE_GPU, CPU, EXPERTS, GPU, Values, fp8, megatron, one_problem, parts, recompute, untried

REFUSED: list[tuple[Values, str]] = [
    # fields of megatron-core
    (megatron("tensor_model_parallel_size", 2), ": this is set by student.parallel.tensor; leave it out"),
    (megatron("sequence_parallel", True), "this is set by student.parallel.sequence"),
    (megatron("bf16", True), "this is set by student.precision.dtype"),
    (megatron("fp8", "e4m3"), "this is set by student.precision.fp8"),
    (megatron("num_layers", 3), "this is set by student.checkpoint (the model's own config.json)"),
    (megatron("moe_router_topk", 1), "this is set by student.checkpoint (the model's own config.json)"),
    (megatron("calculate_per_token_loss", False), ": the trainer relies on its own value; leave it out"),
    (megatron("hidden_dropout", 0.1), "so there is no dropout; leave it out"),
    (megatron("moe_expert_capacity_factor", 1.0), "would depend on the tokens beside it, or on chance; leave it out"),
    (megatron("moe_per_layer_logging", True), "nothing here reads it; leave it out"),
    (megatron("moe_aux_loss_coeff", 0.1), "student.megatron.moe_aux_loss_coeff: the model has no experts; leave it"),
    (
        {"student/config.json": EXPERTS} | megatron("moe_router_load_balancing_type", "sinkhorn"),
        "student.megatron.moe_router_load_balancing_type: 'sinkhorn', but packs hold rows of many lengths and",
    ),
    (
        {"student/config.json": EXPERTS} | megatron("moe_token_dispatcher_type", "allgather"),
        "'allgather', but micro-batches differ in length, which allgather refuses; use alltoall",
    ),
    ({"student/config.json": EXPERTS} | megatron("moe_aux_loss_coeff", [0.1]), "[0.1] is not allowed; give one number"),
    ({"student/config.json": EXPERTS} | megatron("moe_z_loss_coeff", -1.0), "-1.0 is not allowed; give one number of"),
    (
        {"teachers.math/config.json": EXPERTS} | megatron("moe_aux_loss_coeff", 0.1, "teachers.math"),
        "teachers.math.megatron.moe_aux_loss_coeff: a teacher is not trained, so it has no effect; leave it out",
    ),
    (
        {"student/config.json": EXPERTS, "student.layer_spec": "local"} | untried("moe_permute_fusion", True),
        "True needs Transformer Engine's kernels and student.layer_spec is local; leave it out",
    ),
    (
        untried("fp4", "e2m1") | {"known": {"machine": BARE_GPU}},
        "student.megatron.fp4: 'e2m1' needs Transformer Engine's kernels and Transformer Engine cannot be",
    ),
    (
        fp8() | parts("moe", experts=True),
        "student.megatron.recompute_modules: 'moe' with student.precision.fp8 reads process groups that only",
    ),
    (
        megatron("tp_comm_overlap", True),
        "student.megatron.tp_comm_overlap: nobody has tried it here (communication of tensor-parallel layers behind "
        "their products); leave it out, or set student.megatron_untested=true to try it",
    ),
    (
        megatron("recompute_granularty", "full", "teachers.math"),
        "teachers.math.megatron.recompute_granularty: megatron-core 0.16 to 0.19 have no such field; did you mean "
        "'recompute_granularity'? one of a newer release needs teachers.math.megatron_untested=true",
    ),
    (
        untried("recompute_granularity", "selective"),
        "student.megatron_untested: true, but no field of student.megatron needs it; leave it out",
    ),
    (megatron("init_method_std", 0.1), "init_method_std: has no effect: every weight comes from the checkpoint; leave"),
    (megatron("rotary_interleaved", True), "this is set by student.checkpoint (the model's own config.json)"),
    (megatron("deallocate_pipeline_outputs", True), "has no effect, since student.parallel.pipeline is 1; leave it"),
    (untried("tp_only_amax_red", True), "has no effect without student.precision.fp8 on a GPU; leave it out"),
    ({"student/config.json": EXPERTS} | megatron("moe_router_dtype", None), "None, but other formats route a token in"),
    # recomputation
    (megatron("recompute_granularity", "full", "teachers.math"), "a teacher is not trained, so it has no effect;"),
    (
        megatron("recompute_granularity", "full"),
        "student.megatron.recompute_granularity: full needs recompute_method and recompute_num_layers beside it; ",
    ),
    *(
        (
            megatron(field, value),
            f"student.megatron.{field}: has no effect unless student.megatron.recompute_granularity is {needed};",
        )
        for field, value, needed in (
            ("recompute_method", "block", "full"),
            ("recompute_num_layers", 2, "full"),
            ("recompute_modules", ["mlp"], "selective"),
        )
    ),
    (
        recompute(recompute_num_layers=3),
        "student.megatron.recompute_num_layers: 3 does not divide the 4 layers of each of the pipeline stages; take 1 "
        "or 2 or 4",
    ),
    (
        recompute(recompute_num_layers=2, pipeline=3),
        "2 does not divide the 1 and 2 layers of the pipeline stages; take 1",
    ),
    (recompute(recompute_num_layers=0, recompute_method="block"), "0 is below 1; give a number of layers"),
    (recompute(recompute_num_layers=5, recompute_method="block"), "5 exceeds the 4 layers of each of the pipeline"),
    (parts(), "student.megatron.recompute_modules: names nothing to recompute; leave it out for core_attn"),
    (parts("core_attention"), "'core_attention' is no part of these models; did you mean core_attn?"),
    (parts("moe"), "'moe' has no effect: the model has no experts; leave it out"),
    (parts("mlp", experts=True), "'mlp' has no effect: every layer has experts; leave it out"),
    (
        parts("layernorm") | {"known": {"machine": GPU}},
        "'layernorm' has no effect: norms are part of Transformer Engine's linear layers; leave it out",
    ),
    (
        parts("moe_act", experts=True) | {"known": {"machine": CPU}},
        "'moe_act' needs Transformer Engine and there is no GPU; leave it out, or take another part",
    ),
    (
        parts("moe_act", experts=True) | {"known": {"machine": GPU}},
        "nobody has tried 'moe_act' here; leave it out, or set student.megatron_untested=true",
    ),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED, ids=[f"{i}-{next(iter(c))}" for i, (c, _) in enumerate(REFUSED)])
def test_one_mistake_is_one_problem(values: Values, changes: Values, says: str) -> None:
    one_problem(values, changes, says)
