"""Writes checkpoints with megatron-core in several layouts, and loads others with it: run by ``test_megatron_checkpoint``.

Usage: torchrun ... write_megatron_checkpoints.py FOLDER. In FOLDER, ``<name>.json`` holds a model's arguments. Each is drawn at
random and saved as ``<name>-<layout>-<format>``; ``<name>.logits.pt`` is what it computes, and ``<name>-ours-torch_dist.pt``
what the checkpoint ``<name>-ours-torch_dist`` computes.
"""

import json
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

warnings.simplefilter("ignore")
sys.path.append(str(Path(__file__).parents[1] / "strategies"))
import megatron_on_cpu  # noqa: E402, F401
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402

LAYOUTS = {"tp1": (1, 1, None), "tp2": (2, 1, None), "pp2": (1, 2, None), "vpp": (1, 2, 2), "tp2-pp2": (2, 2, None)}


def start(tensor: int, pipeline: int, virtual: int | None) -> None:
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor, pipeline, virtual)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)


def build(given: dict, tensor: int, pipeline: int, virtual: int | None) -> list[GPTModel]:
    """Megatron's model of these arguments, by its own embeddings, layers, rotary positions and head."""
    norms = {"normalization": "RMSNorm", "qk_layernorm": given.get("qk_layernorm", False)}
    config = TransformerConfig(
        num_layers=given["num_layers"],
        hidden_size=given["hidden_size"],
        ffn_hidden_size=given["ffn_hidden_size"],
        num_attention_heads=given["num_attention_heads"],
        num_query_groups=given["num_query_groups"],
        kv_channels=given["kv_channels"],
        layernorm_epsilon=given["norm_epsilon"],
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=given.get("add_qkv_bias", False),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        pipeline_dtype=torch.float32,
        overlap_p2p_comm=virtual is not None,
        batch_p2p_comm=virtual is None,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **norms,
    )
    chunks = []
    for index in range(virtual or 1):
        stage = index if virtual else None
        where = {"ignore_virtual": False, "vp_stage": stage}
        chunks.append(
            GPTModel(
                config=config,
                transformer_layer_spec=get_gpt_layer_local_spec(**norms),
                vocab_size=given["padded_vocab_size"],
                max_sequence_length=given["max_position_embeddings"],
                pre_process=parallel_state.is_pipeline_first_stage(**where),
                post_process=parallel_state.is_pipeline_last_stage(**where),
                share_embeddings_and_output_weights=not given["untie_embeddings_and_output_weights"],
                position_embedding_type="rope",
                rotary_base=given["rotary_base"],
                rope_scaling=given.get("use_rope_scaling", False),
                rope_scaling_factor=given.get("rope_scaling_factor", 8.0),
                seq_len_interpolation_factor=given.get("rotary_seq_len_interpolation_factor"),
                vp_stage=stage,
            ).eval()
        )
    return chunks


def common(given: dict, layout: tuple) -> dict:
    """What Megatron-LM saves beside the model, with the types that its arguments have."""
    arguments = {**given, "params_dtype": torch.float32, "attention_backend": AttnBackend.unfused}
    sizes = zip(("tensor_model_parallel_size", "pipeline_model_parallel_size"), layout, strict=False)
    return {"args": Namespace(**arguments, **dict(sizes)), "checkpoint_version": 3.0, "iteration": 10}


def save(given: dict, chunks: list[GPTModel], layout: tuple, folder: Path) -> None:
    """``folder``-torch_dist, and ``folder``-torch with a file for each rank of tensor and pipeline parallelism."""
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    dist_folder, legacy = Path(f"{folder}-torch_dist") / "iter_0000010", Path(f"{folder}-torch") / "iter_0000010"
    dist_folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    sharded = {name: chunk.sharded_state_dict() for name, chunk in zip(names, chunks, strict=True)}
    dist_checkpointing.save({**sharded, **common(given, layout)}, str(dist_folder))
    ranks = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    if parallel_state.get_data_parallel_rank() == 0:
        name = f"mp_rank_{ranks[0]:02d}" + (f"_{ranks[1]:03d}" if layout[1] > 1 else "")
        (legacy / name).mkdir(parents=True, exist_ok=True)
        states = {n: chunk.state_dict_for_save_checkpoint() for n, chunk in zip(names, chunks, strict=True)}
        rng = [{"np_rng_state": __import__("numpy").random.get_state()}]
        torch.save({**states, **common(given, layout), "rng_state": rng}, legacy / name / "model_optim_rng.pt")
    dist.barrier()
    for parent in (dist_folder.parent, legacy.parent):
        (parent / "latest_checkpointed_iteration.txt").write_text("10")


def load(chunks: list[GPTModel], folder: Path) -> None:
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    wanted = {name: chunk.sharded_state_dict() for name, chunk in zip(names, chunks, strict=True)}
    state = dist_checkpointing.load(wanted, str(folder / "iter_0000010"))
    for name, chunk in zip(names, chunks, strict=True):
        chunk.load_state_dict(state[name])


@torch.no_grad()
def logits(model: GPTModel) -> torch.Tensor:
    tokens = torch.randint(250, (2, 24), generator=torch.Generator().manual_seed(1))
    return model(tokens, torch.arange(24).expand(2, -1), None)


def models(folder: Path) -> Iterator[tuple[Path, dict]]:
    for path in sorted(folder.glob("*.json")):
        yield path.with_suffix(""), json.loads(path.read_text())


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    for layout_name, layout in LAYOUTS.items():
        if layout[0] * layout[1] > dist.get_world_size():
            continue
        start(*layout)
        for path, given in models(folder):
            chunks = build(given, *layout)
            if layout_name == "tp1":
                with torch.no_grad():  # wider than fresh weights; norms and biases are constants in them
                    for parameter in chunks[0].parameters():
                        parameter.add_(torch.randn_like(parameter) * 0.1)
                        dist.broadcast(parameter, 0)
                torch.save(logits(chunks[0]), f"{path}.logits.pt")
            else:
                load(chunks, Path(f"{path}-tp1-torch_dist"))
            save(given, chunks, layout, Path(f"{path}-{layout_name}"))
    start(1, 1, None)
    for path, given in models(folder):
        (model,) = build(given, 1, 1, None)
        if Path(f"{path}-ours-torch_dist").exists():
            load([model], Path(f"{path}-ours-torch_dist"))
            torch.save(logits(model), f"{path}-ours-torch_dist.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
