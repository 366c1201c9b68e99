"""Writes checkpoints with megatron-core in several layouts, and loads others with it: run by ``test_megatron_checkpoint``.

Usage: torchrun ... write_megatron_checkpoints.py FOLDER. In FOLDER, ``<name>.json`` holds a model's arguments. Each is drawn at
random and saved as ``<name>-<layout>-<format>``; ``<name>.logits.pt`` is what it computes, and ``<name>-ours-<format>.pt``
what the checkpoint ``<name>-ours-<format>`` computes.
"""

import json
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

warnings.simplefilter("ignore")
sys.path.append(str(Path(__file__).parents[1] / "strategies"))
import mamba_on_cpu  # noqa: E402
import megatron_on_cpu  # noqa: E402, F401
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402
from megatron.core.transformer.moe import experts, moe_utils  # noqa: E402

moe_utils.te_general_gemm = None  # 0.16 reads the name also without Transformer Engine
HAS_GROUPED = hasattr(experts, "GroupedMLP")  # not in 0.19
if HAS_GROUPED:
    experts.gg.assert_grouped_gemm_is_available = lambda: None  # GroupedMLP is built and saved, but does not compute


@dataclass(frozen=True)
class Layout:
    """grouped: experts as one matrix (GroupedMLP) where Megatron has it, not one after the other (SequentialMLP)."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    expert: int = 1
    expert_tensor: int | None = None
    grouped: bool = False


DENSE = {
    "tp2": Layout(2),
    "pp2": Layout(1, 2),
    "vpp": Layout(1, 2, 2),
    "tp2-pp2": Layout(2, 2),
}
EXPERTS = {
    "ep2": Layout(expert=2),
    "tp2-ep2": Layout(2, expert=2),
    "pp2-ep2-grouped": Layout(1, 2, expert=2, grouped=True),
    "tp2-grouped": Layout(2, grouped=True),
    "tp2-ep4-etp1": Layout(2, expert=4, expert_tensor=1),
}
HYBRID = {"tp2": Layout(2), "tp2-pp2": Layout(2, 2)}


def layouts(given: dict) -> dict[str, Layout]:
    found = EXPERTS if given.get("num_experts") else HYBRID if "hybrid_override_pattern" in given else DENSE
    return {"tp1": Layout(), **found}


def start(layout: Layout) -> None:
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        layout.tensor,
        layout.pipeline,
        layout.virtual,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
    )
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)


def configuration(given: dict, layout: Layout) -> TransformerConfig:
    kind: dict[str, Any] = {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
    if "hybrid_override_pattern" in given:
        kind = {
            "activation_func": lambda x: torch.nn.functional.relu(x).square(),
            "is_hybrid_model": True,
            "use_mamba_mem_eff_path": False,
            **{name: given[name] for name in given if name.startswith("mamba_")},
        }
    if given.get("num_experts"):
        kind |= {
            "num_moe_experts": given["num_experts"],
            "moe_ffn_hidden_size": given["moe_ffn_hidden_size"],
            "moe_router_topk": given["moe_router_topk"],
            "moe_router_pre_softmax": given.get("moe_router_pre_softmax", False),
            "moe_layer_freq": given.get("moe_layer_freq", 1),
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "alltoall",
            "expert_model_parallel_size": layout.expert,
            "expert_tensor_parallel_size": layout.expert_tensor,
        }
        if HAS_GROUPED:
            kind |= {"moe_grouped_gemm": layout.grouped, "moe_use_legacy_grouped_gemm": layout.grouped}
    return TransformerConfig(
        num_layers=given["num_layers"],
        hidden_size=given["hidden_size"],
        ffn_hidden_size=given["ffn_hidden_size"],
        num_attention_heads=given["num_attention_heads"],
        num_query_groups=given["num_query_groups"],
        kv_channels=given["kv_channels"],
        layernorm_epsilon=given["norm_epsilon"],
        normalization="RMSNorm",
        qk_layernorm=given.get("qk_layernorm", False),
        add_bias_linear=False,
        add_qkv_bias=given.get("add_qkv_bias", False),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual,
        pipeline_dtype=torch.float32,
        overlap_p2p_comm=layout.virtual is not None,
        batch_p2p_comm=layout.virtual is None,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **kind,
    )


def build(given: dict, layout: Layout) -> list[Any]:
    """Megatron's model of these arguments, by its own embeddings, layers, rotary positions and head."""
    config, chunks = configuration(given, layout), []
    for index in range(layout.virtual or 1):
        stage = index if layout.virtual else None
        where = {"ignore_virtual": False, "vp_stage": stage}
        common = {
            "config": config,
            "vocab_size": given["padded_vocab_size"],
            "max_sequence_length": given["max_position_embeddings"],
            "pre_process": parallel_state.is_pipeline_first_stage(**where),
            "post_process": parallel_state.is_pipeline_last_stage(**where),
            "share_embeddings_and_output_weights": not given["untie_embeddings_and_output_weights"],
            "position_embedding_type": given["position_embedding_type"],
        }
        if "hybrid_override_pattern" in given:
            pattern = given["hybrid_override_pattern"]
            model = mamba_on_cpu.MambaModel(
                mamba_stack_spec=mamba_on_cpu.STACK, hybrid_override_pattern=pattern, **common
            )
        else:
            model = GPTModel(
                transformer_layer_spec=get_gpt_decoder_block_spec(
                    config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=stage
                ),
                rotary_base=given["rotary_base"],
                rope_scaling=given.get("use_rope_scaling", False),
                rope_scaling_factor=given.get("rope_scaling_factor", 8.0),
                seq_len_interpolation_factor=given.get("rotary_seq_len_interpolation_factor"),
                vp_stage=stage,
                **common,
            )
        chunks.append(model.eval())
    return chunks


def common(given: dict, layout: Layout) -> dict:
    """What Megatron-LM saves beside the model, with the types that its arguments have."""
    arguments = {
        **given,
        "params_dtype": torch.float32,
        "attention_backend": AttnBackend.unfused,
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor,
    }
    return {"args": Namespace(**arguments), "checkpoint_version": 3.0, "iteration": 10}


def save(given: dict, chunks: list[Any], layout: Layout, folder: Path) -> None:
    """``folder``-torch_dist, and ``folder``-torch with the files and their names as Megatron-LM's save_checkpoint has them."""
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    dist_folder, legacy = Path(f"{folder}-torch_dist") / "iter_0000010", Path(f"{folder}-torch") / "iter_0000010"
    dist_folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    sharded = {name: chunk.sharded_state_dict() for name, chunk in zip(names, chunks, strict=True)}
    dist_checkpointing.save({**sharded, **common(given, layout)}, str(dist_folder))
    if parallel_state.get_expert_data_parallel_rank() == 0:
        name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
        if layout.pipeline > 1:
            name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
        if layout.expert > 1:
            name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
        (legacy / name).mkdir(parents=True, exist_ok=True)
        states = {n: chunk.state_dict_for_save_checkpoint() for n, chunk in zip(names, chunks, strict=True)}
        rng = [{"np_rng_state": __import__("numpy").random.get_state()}]
        torch.save({**states, **common(given, layout), "rng_state": rng}, legacy / name / "model_optim_rng.pt")
    dist.barrier()
    for parent in (dist_folder.parent, legacy.parent):
        (parent / "latest_checkpointed_iteration.txt").write_text("10")


def load(chunks: list[Any], folder: Path) -> None:
    """As Megatron-LM's load_checkpoint loads either format."""
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    legacy = folder / "iter_0000010" / "mp_rank_00" / "model_optim_rng.pt"
    if legacy.exists():
        state = torch.load(legacy, map_location="cpu")
    else:
        wanted = {name: chunk.sharded_state_dict() for name, chunk in zip(names, chunks, strict=True)}
        state = dist_checkpointing.load(wanted, str(folder / "iter_0000010"))
    for name, chunk in zip(names, chunks, strict=True):
        chunk.load_state_dict(state[name])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(250, (2, 24), generator=torch.Generator().manual_seed(1))
    return model(tokens, torch.arange(24).expand(2, -1), None)


def models(folder: Path) -> Iterator[tuple[Path, dict]]:
    for path in sorted(folder.glob("*.json")):
        yield path.with_suffix(""), json.loads(path.read_text())


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    every = {name: layout for _, given in models(folder) for name, layout in layouts(given).items()}
    for layout_name, layout in every.items():
        start(layout)
        for path, given in models(folder):
            if layout_name not in layouts(given):
                continue
            chunks = build(given, layout)
            if layout_name == "tp1":
                with torch.no_grad():  # wider than fresh weights; norms and biases are constants in them
                    for parameter in chunks[0].parameters():
                        parameter.add_(torch.randn_like(parameter) * 0.1)
                        dist.broadcast(parameter, 0)
                torch.save(logits(chunks[0]), f"{path}.logits.pt")
            else:
                load(chunks, Path(f"{path}-tp1-torch_dist"))
            save(given, chunks, layout, Path(f"{path}-{layout_name}"))
    start(Layout())
    for path, given in models(folder):
        for ours in sorted(one for one in folder.glob(f"{path.name}-ours-*") if one.is_dir()):
            (model,) = build(given, Layout())
            load([model], ours)
            torch.save(logits(model), f"{ours}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
