"""What tests of Megatron share: tiny models of each family, runs by one process with FSDP2, and runs of several ranks."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from runs import comparable, rows

TP, CP, PP = "tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size"
VPP_KEY = "virtual_pipeline_model_parallel_size"
FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
VPP = {PP: 2, VPP_KEY: 2}
SP, SHARDED = {"sequence_parallel": True}, {"use_distributed_optimizer": True}
RECOMPUTED, SELECTIVE = {"recompute_granularity": "full"}, {"recompute_granularity": "selective"}
EP = "expert_model_parallel_size"
ALLGATHER, GROUPED = {"moe_token_dispatcher_type": "allgather"}, {"moe_grouped_gemm": True}
OVERLAPPED = {"overlap_grad_reduce": True, "ddp_average_in_collective": True}

needs_megatron = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs limbeck[megatron]")

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
HYBRID = {
    "hybrid_override_pattern": "M-*M",
    "head_dim": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 8,
    "chunk_size": 16,
}
# Norms of queries and keys; rows of uneven lengths, which neither 2 nor 4 divides. Tied and padded vocabulary, packed.
# Pairs of layers on the same and on different stages; the teacher is wider, so projections are trained.
LAYER = "model.layers."
STUDENTS = {
    "qwen3": (
        {"kind": "qwen3", "head_dim": 8, "vocab_size": 325},
        {
            "student.sequence_length_round_in_train": 1,
            "features.pairs": [
                ["model.embed_tokens", "model.embed_tokens", "mse"],
                [f"{LAYER}0.mlp", f"{LAYER}3.mlp"],
                [f"{LAYER}2.post_attention_layernorm", f"{LAYER}0.input_layernorm"],
                [f"{LAYER}3.self_attn", f"{LAYER}1.self_attn.o_proj", "mse"],
            ],
        },
    ),
    "llama": (
        {"kind": "llama", "vocab_size": 333, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
        {
            "student.use_sequence_packing": True,
            "sequence_length": 96,
            "features.pairs": [[f"{LAYER}*", f"{LAYER}*"], ["model.norm", f"{LAYER}3", "mse"]],
            "features.mask": "supervised",
        },
    ),
    # A layer without experts; weights of experts that do not sum to 1, and that do.
    "qwen3_moe": (
        {"kind": "qwen3_moe", "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
         "mlp_only_layers": [1]},
        {"student.sequence_length_round_in_train": 1},
    ),
    "mixtral": (
        {"kind": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": True},
        {
            "student.use_sequence_packing": True,
            "sequence_length": 96,
            "features.pairs": [
                [f"{LAYER}0.mlp", f"{LAYER}3.mlp", "mse"],
                [f"{LAYER}3", f"{LAYER}1.mlp"],
                [f"{LAYER}2.post_attention_layernorm", f"{LAYER}0.mlp"],
            ],
        },
    ),
    "hybrid": (
        {"kind": "nemotron_h", **HYBRID},
        {
            "student.use_sequence_packing": True,
            "sequence_length": 95,
            "student.sequence_length_round_in_train": 1,
            "features.pairs": [
                ["model.embeddings", "model.norm_f", "mse"],
                [f"{LAYER}0.mixer", f"{LAYER}2.mixer.o_proj", "mse"],
                [f"{LAYER}1.mixer.down_proj", f"{LAYER}3"],
                [f"{LAYER}2", f"{LAYER}1.mixer"],
                [f"{LAYER}3.norm", f"{LAYER}0.mixer", "mse"],
            ],
        },
    ),
}  # fmt: skip
TEACHERS = {"hybrid": "teacher of hybrid", "mixtral": "qwen3_moe"}  # other students have the same teacher


def configuration(folder: Path, output: Path, student: str, **changes) -> dict:
    of_all = {
        "max_steps": 8,
        "save_steps": 4,
        "eval_steps": 8,
        "student.model_args.disable_gradient_checkpointing": True,
        "student.training_args.weight_decay": 0.1,
        **rows(2, 4),
        "validation.data_args.file_name": [str(folder / "rows.jsonl")],
    }
    teacher = TEACHERS.get(student, "teacher")
    return comparable(folder, output, student, teacher, **{**of_all, **STUDENTS[student][1], **changes})


def layout(student: dict, teacher: dict | None = None) -> dict:
    """Megatron for the student and, unless it has no settings, for the teacher."""
    found = {
        "plugins": [str(Path(__file__).with_name("megatron_on_cpu.py"))],
        "student.strategy_args.strategy_name": "megatron_train",
        "student.strategy_args.strategy_config": student,
    }
    if teacher is not None:
        found |= {
            "teacher.strategy_args.strategy_name": "megatron_infer",
            "teacher.strategy_args.strategy_config": teacher,
        }
    return found


def run_ranks(ranks: int, configurations: dict[Path, dict], killed: bool = False) -> str:
    """Run the configurations one after the other in one group of processes, each of which is written to its path.

    One that is refused leaves the sentence beside its path, with the suffix ``.error``. killed: the last one ends the group.
    """
    for path, settings in configurations.items():
        path.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    script = str(Path(__file__).with_name("run_configurations.py"))
    done = subprocess.run(
        [*command, script, *map(str, configurations)], capture_output=True, text=True, timeout=280, check=False
    )
    assert (done.returncode != 0) is killed, done.stdout + done.stderr
    return done.stdout + done.stderr
