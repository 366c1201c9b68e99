"""Run by torchrun on two ranks: every family and layout gives the logits of Transformers, and its weights back.

With arguments: these kinds of model only, with Megatron-Bridge at hand.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
import megatron_on_cpu  # noqa: F401

if sys.argv[1:]:
    import bridge_on_cpu  # noqa: F401

from limbeck.config.schema import MegatronConfig
from limbeck.models.megatron_families import FAMILIES, HEAD, layers_with_experts
from limbeck.strategies.megatron.body import build_gpt_chunks, wrap_body
from limbeck.strategies.megatron.core import ProcessGroups
from limbeck.strategies.megatron.weights import WeightMap
from limbeck.strategies.parallel_dims import ParallelDims

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
         "num_hidden_layers": 3, "vocab_size": 67, "sliding_window": None}  # fmt: skip
CHANGES = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "decoder_sparse_step": 2,
        "norm_topk_prob": True,
    },
    "arcee": {"attention_bias": True, "mlp_bias": True},
    "glm4_moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
        "use_qk_norm": True,
        "attention_bias": True,
    },
}
WITH_EXPERTS = CHANGES.keys() - {"arcee"}
HYBRID = {"nemotron_h": {"hybrid_override_pattern": "M-*", "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2,
                         "ssm_state_size": 8, "chunk_size": 4}}  # fmt: skip
DENSE = [
    (ParallelDims(dp_replicate=2), {}),
    (ParallelDims(tp=2, etp=2, sequence_parallel=True), {}),
    (ParallelDims(pp=2), {"num_layers_in_first_pipeline_stage": 2}),
]
EXPERTS = [
    (ParallelDims(dp_shard=2, ep=2), {"moe_grouped_gemm": True}),
    (ParallelDims(dp_shard=2, ep=2), {"moe_token_dispatcher_type": "allgather"}),
    (ParallelDims(tp=2, ep=2, sequence_parallel=True), {"moe_router_dtype": "fp64"}),
]


@torch.no_grad()
def check(kind: str, dims: ParallelDims, settings: dict, **changes) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **SHAPE | (CHANGES | HYBRID).get(kind, {}) | changes)
    )
    for tensor in model.state_dict().values():
        tensor.mul_(3)
        if kind not in FAMILIES:  # also where zeros are usual
            tensor.add_(0.1 * torch.randn_like(tensor))
    ids = torch.randint(SHAPE["vocab_size"], (2, 7 + dist.get_rank() * (dims.dp_shard > 1)))  # uneven with experts
    expected = model.eval()(ids).logits
    groups, whole = ProcessGroups(dims), dict(model.state_dict())
    (gpt,) = build_gpt_chunks(
        model, dims, torch.float32, MegatronConfig(**settings), recompute=False, name=kind, role="student"
    )
    trunk, weights = wrap_body(model, gpt, groups, dims).eval(), WeightMap([gpt], model, groups)
    for parameter, value in weights.slices(whole):
        parameter.copy_(value)
    received = None if gpt.pre_process else torch.empty(*ids.shape, SHAPE["hidden_size"])
    if received is not None:
        dist.recv(received, 0)
    hidden = trunk(None if received is not None else ids, received).last_hidden_state
    if gpt.post_process:
        part = hidden @ (gpt.shared_embedding_or_output_weight() if weights.tied else gpt.output_layer.weight).T
        parts = [torch.empty_like(part) for _ in range(dims.tp)]
        dist.all_gather(parts, part, group=groups.tensor)
        logits = torch.cat(parts, -1)[..., : SHAPE["vocab_size"]]
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
        assert expected.std() > 0.2
    else:
        dist.send(hidden.contiguous(), 1)
    seen = [None, None]
    streamed = {name: torch.equal(value, whole[name]) for name, value in weights.stream(lambda parameter: parameter)}
    dist.all_gather_object(seen, streamed)
    assert seen[0] | seen[1] == dict.fromkeys(whole.keys() - ({HEAD} if weights.tied else set()), True), (kind, dims)
    if kind in WITH_EXPERTS:
        assert any(layers_with_experts(model))
        assert gpt.config.moe_router_bias_update_rate == 0  # else a step would change the router's bias


dist.init_process_group("gloo")
for kind in sys.argv[1:] or FAMILIES:
    for dims, settings in DENSE + (EXPERTS if kind in WITH_EXPERTS else []):
        check(kind, dims, settings)
    if kind in FAMILIES:
        check(kind, *DENSE[1], num_key_value_heads=1)  # the ranks share a key head
dist.destroy_process_group()
