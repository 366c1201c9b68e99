"""Megatron-LM's YAML files of arguments (``--yaml-cfg``).

A file has the arguments under their names with ``_`` for ``-``, those of the model and of parallelism in sections of their
own. Some have the names of megatron-core's configuration classes instead.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from limbeck.config.deepspeed import words
from limbeck.config.dialects import megatron_table as table
from limbeck.config.dialects.files import read_mapping
from limbeck.config.locations import SourceLocation
from limbeck.config.translation import Translation
from limbeck.config.validation_errors import format_value

SECTIONS = ("language_model", "model_parallel")

RENAMED = {
    "layernorm_epsilon": "norm-epsilon",
    "layernorm_zero_centered_gamma": "apply-layernorm-1p",
    "num_moe_experts": "num-experts",
    "fp8": "fp8-format",
    "virtual_pipeline_model_parallel_size": "num-virtual-stages-per-pipeline-rank",
    "num_layers_in_first_pipeline_stage": "decoder-first-pipeline-num-layers",
    "num_layers_in_last_pipeline_stage": "decoder-last-pipeline-num-layers",
}
"""Keys to the arguments of another name."""

NEGATED = {"add_bias_linear": "disable-bias-linear"}
"""Keys to the switch that makes them false."""

ACTIVATIONS: dict[str, tuple[str, ...]] = {"swiglu": ("swiglu",), "squaredrelu": ("squared-relu",), "gelu": ()}
"""Values of ``activation_func`` to the switches that they stand for."""

ONLY_FALSE = words("cpu_offloading moe_token_dropping moe_input_jitter_eps adlr_autoresume standalone_embedding_stage")
"""Keys that are no arguments, and would change the result."""

WITHOUT_EFFECT = words(
    """gated_linear_unit init_method output_layer_init_method perform_initialization memory_efficient_layer_norm
    clone_scatter_output_in_embedding params_dtype timers
    tp_comm_split_ag tp_comm_atomic_ag tp_comm_split_rs tp_comm_atomic_rs tp_comm_bulk_wgrad tp_comm_bulk_dgrad
    finalize_model_grads_func pipeline_dtype grad_scale_func enable_autocast autocast_dtype variable_seq_lengths
    num_microbatches_with_partial_activation_checkpoints overlap_p2p_comm batch_p2p_comm batch_p2p_sync
    use_ring_exchange_p2p deallocate_pipeline_outputs no_sync_func grad_sync_func param_sync_func
    pipeline_model_parallel_split_rank cpu_offloading_num_layers _cpu_offloading_context cpu_offloading_weights
    cpu_offloading_activations barrier_with_L1_time bert_binary_head delay_grad_reduce delay_param_gather
    scatter_gather_tensors_in_pipeline lazy_mpu_init
    adlr_autoresume_interval tp_comm_overlap_cfg retriever_seq_length mask_prob short_seq_prob enable_one_logger
    fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad
    add_position_embedding bias_activation_fusion"""
)
"""Keys that are no arguments, and change no result."""


def read_arguments(result: Translation, name: str, locations: dict[str, SourceLocation]) -> dict[str, Any]:
    """The arguments of the file ``name`` as if they were given as flags; ``locations`` gets their lines.

    Raises:
        LimbeckError: if the file is not YAML.
    """
    content = read_mapping(Path(name), "--yaml-cfg", locations)
    given: dict[str, Any] = {}
    for path, key, value in _keys(result, content, locations):
        for flag, text in _arguments(result, path, key, value):
            given[flag] = text
            locations.setdefault(f"--{flag}", locations.get(path, SourceLocation(name)))
    if "num-query-groups" in given:  # in a file Megatron-LM reads this key alone
        given["group-query-attention"] = True
        locations.setdefault("--group-query-attention", locations["--num-query-groups"])
    return given


def _keys(
    result: Translation, content: Mapping[str, Any], locations: Mapping[str, SourceLocation]
) -> Iterator[tuple[str, str, Any]]:
    """The path, name and value of every key; ``null`` and empty texts are values that are not given."""
    for name, value in content.items():
        inside = value if isinstance(value, dict) and name in SECTIONS else None
        for key, found in ({name: value} if inside is None else inside).items():
            path = f"{name}.{key}" if inside is not None else str(key)
            if found is not None and found != "":
                yield path, str(key), _expanded(result, path, found)


def _arguments(result: Translation, path: str, key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The flags that a key of the file stands for, with their texts."""
    kinds = table.kinds()
    flag = RENAMED.get(key, key.replace("_", "-"))
    if key == "activation_func" and isinstance(value, str) and value in ACTIVATIONS:
        yield from ((name, True) for name in ACTIVATIONS[value])
    elif (opposite := NEGATED.get(key, f"no-{flag}")) in kinds and isinstance(value, bool):
        yield from [] if value else [(opposite, True)]
    elif flag not in kinds:
        if key in ONLY_FALSE:
            if value:
                result.refuse(path, f"= {format_value(value)} is not supported; remove it")
        elif key not in WITHOUT_EFFECT:
            near = difflib.get_close_matches(key, [name.replace("-", "_") for name in kinds], n=1)
            result.refuse(path, f"is no argument of Megatron-LM{f'; did you mean {near[0]}?' if near else ''}")
    elif kinds[flag] == table.SWITCH:
        if not isinstance(value, bool):
            result.refuse(path, f"= {format_value(value)} must be true or false")
        elif value:
            yield flag, True
    elif isinstance(value, (dict, bool)) or (
        isinstance(value, list) and kinds[flag] == table.VALUE and flag not in table.PATTERNS
    ):
        if value is not False:  # false is an argument that is not given
            result.refuse(path, f"= {format_value(value)} must be one value")
    elif kinds[flag] == table.VALUES:
        yield flag, [str(one) for one in (value if isinstance(value, list) else str(value).split())]
    else:
        yield flag, str(value)


def _expanded(result: Translation, path: str, value: Any) -> Any:
    """``value`` with the environment variables that it names as ``${NAME}``."""
    if not isinstance(value, str):
        return value
    for name in re.findall(r"\$\{(\w+)\}", value):
        if name not in os.environ:
            result.refuse(path, f"= {value} names the environment variable {name}, which is not set; set it")
        value = value.replace(f"${{{name}}}", os.environ.get(name, ""))
    return value
