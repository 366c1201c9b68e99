"""ModelOpt's distillation with Megatron's schedule and optimizer, as its users run it: what megatron_train is compared with.

It needs nvidia-modelopt, and one tensor-parallel group of all processes. Models are Llama models of Hugging Face.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from limbeck.data.batch import Batch
from limbeck.strategies.megatron.core import ProcessGroups, import_megatron, make_optimizer
from limbeck.strategies.megatron.layers import RMSNorm
from limbeck.strategies.megatron.weights import WeightMap


class Attention(nn.Module):
    """Causal attention by PyTorch's SDPA, as the Hugging Face model's."""

    def __init__(self, config: Any, **unused: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *unused: Any, **also_unused: Any) -> Tensor:
        """query, key, value: [time, batch, heads, dim]; returns [time, batch, heads · dim]."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        attend = nn.functional.scaled_dot_product_attention
        return attend(q, k, v, is_causal=True, enable_gqa=True).permute(2, 0, 1, 3).flatten(2)


def build_gpt(model: Any, groups: ProcessGroups) -> Any:
    """A GPTModel with the weights of the Hugging Face ``model``, whose vocabulary the ranks must divide."""
    core, config = import_megatron(), model.config
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = Attention
    dtype = next(model.parameters()).dtype
    gpt = core.models.gpt.GPTModel(
        core.transformer.TransformerConfig(
            num_layers=config.num_hidden_layers, hidden_size=config.hidden_size, ffn_hidden_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads, num_query_groups=config.num_key_value_heads,
            normalization="RMSNorm", layernorm_epsilon=config.rms_norm_eps, gated_linear_unit=True,
            activation_func=nn.functional.silu, add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0,
            tensor_model_parallel_size=dist.get_world_size(groups.tensor), gradient_accumulation_fusion=False,
            persist_layer_norm=False, params_dtype=dtype, bf16=dtype is torch.bfloat16,
        ),
        TransformerBlockSubmodules(layer_specs=[layer] * config.num_hidden_layers, layer_norm=RMSNorm),
        vocab_size=config.vocab_size, max_sequence_length=config.max_position_embeddings, position_embedding_type="rope",
        rotary_base=config.rope_parameters["rope_theta"],
    )  # fmt: skip
    with torch.no_grad():
        for parameter, value in WeightMap([gpt], model, groups).slices(dict(model.state_dict())):
            parameter.copy_(value)
    return gpt


class Step(NamedTuple):
    """total: minimised, summed over micro-batches. logits: its part from the logits. norm: of the gradients."""

    total: float
    logits: float
    norm: float


class Trainer:
    """Trains ``student`` alone on the labels or, given a ``teacher``, with ModelOpt's plugin.

    Args:
        distillation: keys of ModelOpt's DistillationConfig.
        optimizer: settings of Megatron's AdamW.
    """

    def __init__(
        self, student: Any, teacher: Any | None, distillation: dict, groups: ProcessGroups, **optimizer: Any
    ) -> None:
        distributed, self._groups = import_megatron().distributed, groups
        self._distils = teacher is not None
        self.model = student if teacher is None else _convert(student, teacher, distillation)
        config = self.model.config
        settings = distributed.DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        self._wrapped = distributed.DistributedDataParallel(config, settings, self.model)
        config.finalize_model_grads_func = distributed.finalize_model_grads
        self._optimizer = make_optimizer([self._wrapped], **optimizer)

    def step(self, batches: Sequence[Batch]) -> Step:
        """One optimizer step; the losses are divided by the number of supervised tokens of ``batches``."""
        self._groups.activate()
        self._wrapped.train()
        self._wrapped.zero_grad_buffer()
        self._optimizer.zero_grad()
        tokens = sum(len(batch.supervised) for batch in batches)
        parts = import_megatron().pipeline_parallel.get_forward_backward_func()(
            forward_step_func=partial(self._forward, tokens=tokens, count=len(batches)),
            data_iterator=iter(batches),
            model=[self._wrapped],
            num_microbatches=len(batches),
            seq_length=1,
            micro_batch_size=1,
        )
        total, logits = torch.stack([part["losses"] for part in parts]).sum(0).tolist()
        return Step(total, logits, float(self._optimizer.step()[1]))

    def _forward(self, batches: Iterator[Batch], model: Any, *, tokens: int, count: int) -> tuple[Tensor, Any]:
        batch = next(batches)
        mask = torch.zeros(batch.labels.numel(), device=batch.labels.device)
        mask = mask.index_fill(0, batch.supervised, 1 / tokens).view_as(batch.labels)
        positions = torch.arange(batch.labels.shape[1]).expand_as(batch.labels)
        output = model(batch.input_ids, positions, None, labels=batch.labels.clamp_min(0))

        def mean(losses: Any) -> Tensor:
            values, is_sliced, _ = losses
            value = (values * mask).sum()
            if is_sliced:  # outside of autograd: each rank's gradient is that of its slice of the vocabulary
                dist.all_reduce(value, group=self._groups.tensor)
            return value

        def loss(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            student_loss = (output * mask).sum()
            found = {"kd_loss": student_loss, "logits_loss": student_loss}
            if self._distils:
                found = self.model.compute_kd_loss(student_loss=student_loss, loss_reduction_fn=mean)
            total = found["kd_loss"]
            shown = (
                torch.stack([total, found["logits_loss"]]).detach().clone()
            )  # the schedule divides the loss in place
            return total * count, torch.ones((), dtype=torch.int), {"losses": shown}

        return output, loss


def _convert(student: Any, teacher: Any, distillation: dict) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import modelopt.torch.distill as mtd
        from modelopt.torch.distill.plugins import megatron as plugin
    config = plugin.setup_distillation_config(plugin.DistillationConfig(**distillation), student.config, teacher.config)
    mode = {"teacher_model": teacher, "criterion": config.criterion, "loss_balancer": config.loss_balancer}
    model = mtd.convert(student, [("kd_loss", mode)])
    plugin.adjust_distillation_model_for_mcore(model, config)
    plain = model.compute_language_model_loss
    # Megatron's cross-entropy overwrites float32 logits, of which the plugin would then compute the divergence.
    model.compute_language_model_loss = lambda labels, logits: plain(labels, logits.clone())
    return model
