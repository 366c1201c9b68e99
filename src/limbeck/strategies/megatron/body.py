"""Megatron's GPTModel behind the interface of a Hugging Face body, and its construction from a Hugging Face model.

The Hugging Face model stays as a shell with its configuration, while its body and output head are replaced in place. So
the loss, the verification and the teacher read hidden states and head as from any other model.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from limbeck.config.schema import MegatronConfig
from limbeck.errors import LimbeckError
from limbeck.models import body, causal_mask, current_documents, unwrap_model
from limbeck.models.megatron_families import Family, MambaSizes, is_hybrid, layers_with_experts, padded_rows
from limbeck.models.varlen_attention import BY_DOCUMENT
from limbeck.strategies.context_parallel import exchange_heads
from limbeck.strategies.megatron.bridge import find_family
from limbeck.strategies.megatron.core import ProcessGroups, import_megatron, submodules_of
from limbeck.strategies.megatron.experts import Experts, allow_uneven_tokens
from limbeck.strategies.megatron.layers import AttentionInputs, CoreAttention, Norm, RMSNorm
from limbeck.strategies.megatron.mamba import MambaLayer
from limbeck.strategies.megatron.transformer_config import transformer_config
from limbeck.strategies.megatron.transformer_engine import transformer_engine_norm, use_transformer_engine
from limbeck.strategies.parallel_dims import CP, ParallelDims


class MegatronBody(nn.Module):
    """Consecutive layers as a Hugging Face body: token ids, or hidden states of earlier layers, to hidden states.

    Args:
        gpt: the GPTModel with these layers, with the embeddings if they are the first ones.
        shell: the Hugging Face model that it replaces.
        groups: of ``gpt``.
        context: ranks that each hold a part of every row's time, or None.

    Attributes:
        hybrid: whether each layer is either a Mamba layer, attention or a feed-forward layer.
    """

    _no_split_modules: tuple[str, ...] = ()  # nothing here is compiled or sharded layer by layer
    inv_freq: Tensor | None

    def __init__(self, gpt: Any, shell: Any, groups: ProcessGroups, context: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.gpt, self.config, self.groups = gpt, shell.config, groups
        embeddings = shell.get_input_embeddings()
        self._num_embeddings = embeddings.num_embeddings
        scale: float | None = getattr(embeddings, "scalar_embed_scale", None)  # of Gemma
        if scale is not None and gpt.pre_process:
            gpt.embedding.register_forward_hook(lambda _module, _inputs, x: x * torch.tensor(scale, dtype=x.dtype))
        # That for packed rows also where the Hugging Face model's layers cannot use it.
        name = self.config._attn_implementation
        attention = ALL_ATTENTION_FUNCTIONS[BY_DOCUMENT.get(name, name)]
        self._attention = attention if context is None else exchange_heads(attention, context)
        self.hybrid, frequencies = is_hybrid(self.config), None
        if not self.hybrid:
            frequencies = body(shell).rotary_emb.inv_freq.detach().float().clone()  # type: ignore[union-attr, operator]
            frequencies = frequencies.to(torch.cuda.current_device())
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def get_input_embeddings(self) -> Any:
        """An object with the number of embeddings, which is all that is read."""
        return SimpleNamespace(num_embeddings=self._num_embeddings)

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool = False,
        **options: Any,
    ) -> Any:
        """``last_hidden_state`` [batch, time, hidden], as of a Hugging Face body.

        On later pipeline stages, hidden states come from ``inputs_embeds`` or, in Megatron's schedules, from ``gpt``, where
        the schedule puts them before it calls.
        """
        if inputs_embeds is not None:
            self.receive(inputs_embeds)
        given = inputs_embeds if input_ids is None else input_ids
        assert given is not None
        time = given.shape[1]
        return SimpleNamespace(
            last_hidden_state=self.rows(self.message(time, input_ids, position_ids, **options), time)
        )

    def receive(self, hidden: Tensor) -> None:
        """Let the next forward pass begin with ``hidden`` [batch, time, hidden], of an earlier stage."""
        self.groups.activate()
        x = hidden.transpose(0, 1)
        x = pad(x, (0, 0, 0, 0, 0, self.width(len(x)) - len(x))).contiguous()
        if self.gpt.config.sequence_parallel:
            x = import_megatron().tensor_parallel.scatter_to_sequence_parallel_region(x)
        self.gpt.set_input_tensor(x)

    def rows(self, message: Tensor, time: int) -> Tensor:
        """[batch, time, hidden], whole rows of a ``message``. The loss gives every rank the whole gradient."""
        if self.gpt.config.sequence_parallel:
            gather = import_megatron().tensor_parallel.gather_from_sequence_parallel_region
            message = gather(message, tensor_parallel_output_grad=False)
        return message[:time].transpose(0, 1)

    def message(
        self,
        time: int,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The hidden states that Megatron sends to the next stage: [time, batch, hidden], padded to ``width(time)``, of
        which each tensor-parallel rank has a part under sequence parallelism.
        """
        self.groups.activate()
        padding = self.width(time) - time
        hidden = None
        if self.gpt.pre_process:
            assert input_ids is not None
            hidden = self.gpt.embedding(input_ids=pad(input_ids, (0, padding)), position_ids=None)
        computed: Tensor = self.gpt.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=self._angles(time, position_ids, padding),
            packed_seq_params=AttentionInputs(
                time, self._attention, causal_mask(), options, self._document_numbers(time + padding)
            ),
        )
        return computed

    def _angles(self, time: int, position_ids: Tensor | None, padding: int) -> Tensor | None:
        """[time, batch or 1, 1, dim] of rotary embeddings; None for a model without them."""
        if self.inv_freq is None:
            return None
        if position_ids is None:
            position_ids = torch.arange(time, device=self.inv_freq.device).unsqueeze(0)
        angles = pad(position_ids, (0, padding)).T[:, :, None].float() * self.inv_freq
        return torch.cat((angles, angles), -1)[:, :, None]

    def _document_numbers(self, width: int) -> Tensor | None:
        """[width], see ``AttentionInputs``."""
        documents = current_documents()
        if documents is None or not self.hybrid:
            return None
        positions = torch.arange(width, device=documents.cu_seqlens.device)
        return torch.bucketize(positions, documents.cu_seqlens[1:], right=True)

    def width(self, time: int) -> int:
        """``time`` rounded up to what sequence parallelism can divide."""
        config = self.gpt.config
        return padded_rows(time, config.tensor_model_parallel_size) if config.sequence_parallel else time


def build_gpt_chunks(
    model: Any, dims: ParallelDims, dtype: torch.dtype, given: MegatronConfig, *, recompute: bool, name: str, role: str
) -> list[Any]:
    """The GPTModels of this rank without weights: one, or one per virtual pipeline stage.

    The groups of ``dims`` are active. model: Hugging Face model with the shapes, called ``name`` in errors.

    Raises:
        LimbeckError: if the layers cannot be divided over the stages, or Megatron refuses the settings.
    """
    core = import_megatron()
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    shell = unwrap_model(model)
    config, family = shell.config, find_family(model)
    _check_layers(config.num_hidden_layers, dims.pp, given, name, role)
    try:
        settings = transformer_config(config, dims, dtype, given, recompute=recompute, family=family)
        specs = [
            _layer(config, family, number, settings.num_moe_experts if found else None, settings.transformer_impl)
            for number, found in enumerate(layers_with_experts(shell))
        ]
    except (AssertionError, ValueError) as error:
        raise LimbeckError(f"megatron-core refuses {role}.strategy_args.strategy_config: {error}") from error
    norm = transformer_engine_norm() if settings.transformer_impl == "transformer_engine" else _norm(family)
    chunks = []
    for index in range(given.virtual_pipeline_model_parallel_size or 1):
        stage = index if given.virtual_pipeline_model_parallel_size else None
        where = {"ignore_virtual": False, "vp_stage": stage}
        count, offset = get_num_layers_to_build(settings, stage), get_transformer_layer_offset(settings, stage)
        chunks.append(
            GPTModel(
                config=settings,
                transformer_layer_spec=TransformerBlockSubmodules(
                    layer_specs=specs[offset : offset + count], layer_norm=norm
                ),
                vocab_size=padded_rows(shell.get_input_embeddings().num_embeddings, dims.tp),
                max_sequence_length=config.max_position_embeddings,
                pre_process=core.parallel_state.is_pipeline_first_stage(**where),
                post_process=core.parallel_state.is_pipeline_last_stage(**where),
                share_embeddings_and_output_weights=config.tie_word_embeddings,
                position_embedding_type="none",  # the body passes rotary angles to the layers
                vp_stage=stage,
            )
        )
    if given.moe_token_dispatcher_type == "allgather":
        for layer in (
            layer
            for chunk in chunks
            for layer in chunk.decoder.layers
            if hasattr(getattr(layer, "mlp", None), "experts")
        ):
            allow_uneven_tokens(layer.mlp.token_dispatcher)
    return chunks


def wrap_body(model: Any, gpt: Any, groups: ProcessGroups, dims: ParallelDims) -> MegatronBody:
    """``gpt`` as a Hugging Face body. The model is not changed."""
    return MegatronBody(gpt, unwrap_model(model), groups, dims.group(_device_type(), CP))


def replace_body(model: Any, trunk: MegatronBody) -> None:
    """Let ``model`` consist of ``trunk`` and, if these are the last layers, of Megatron's slice of the output head."""
    shell, gpt = unwrap_model(model), trunk.gpt
    setattr(shell, shell.base_model_prefix, trunk)
    head = None
    if gpt.post_process:
        tied = gpt.share_embeddings_and_output_weights
        head = _Head(gpt.shared_embedding_or_output_weight() if tied else gpt.output_layer.weight)
    shell.set_output_embeddings(head)


class _Head(nn.Module):
    """A slice of an output head, of which only the weight is read."""

    bias = None

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


def _device_type() -> str:
    return torch.device(torch.cuda.current_device()).type


def _layer(config: Any, family: Family, number: int, experts: int | None, implementation: str) -> Any:
    """The specification of layer ``number`` of a Hugging Face configuration.

    experts: their number; None without. implementation: ``transformer_engine``, or ``local`` for Megatron's own modules.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

    kind = config.layer_types[number] if family.hybrid else None
    if kind == "linear_attention":
        return ModuleSpec(module=MambaLayer, params={"sizes": MambaSizes.of(config)})
    layer = get_gpt_layer_local_spec(num_experts=experts, normalization="RMSNorm", qk_layernorm=family.qk_norm)
    parts = layer.submodules
    attention = parts.self_attention.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = _norm(family)
    attention.core_attention = CoreAttention
    if family.qk_norm:
        attention.q_layernorm = attention.k_layernorm = _norm(family)
    if experts:
        submodules_of(parts.mlp).experts = Experts
    if implementation == "transformer_engine":
        use_transformer_engine(parts, experts=bool(experts))
    if kind == "full_attention":
        layer.submodules = TransformerLayerSubmodules(
            input_layernorm=parts.input_layernorm,
            self_attention=parts.self_attention,
            self_attn_bda=parts.self_attn_bda,
        )
    elif kind == "mlp":
        layer.submodules = TransformerLayerSubmodules(
            pre_mlp_layernorm=parts.pre_mlp_layernorm, mlp=parts.mlp, mlp_bda=parts.mlp_bda
        )
    return layer


def _norm(family: Family) -> type[nn.Module]:
    """The module of norms in Megatron's local layers."""
    unusual = (
        family.settings.get("layernorm_zero_centered_gamma") or family.settings.get("normalization") == "LayerNorm"
    )
    return Norm if unusual else RMSNorm


def _check_layers(layers: int, stages: int, given: MegatronConfig, name: str, role: str) -> None:
    """Raise LimbeckError unless Megatron can give every stage, and virtual stage, its number of layers."""
    section, virtual = f"{role}.strategy_args.strategy_config", given.virtual_pipeline_model_parallel_size or 1
    counted = given.account_for_embedding_in_pipeline_split + given.account_for_loss_in_pipeline_split
    ends = {
        key: size
        for key in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
        if (size := getattr(given, key)) is not None
    }
    for key, size in ends.items():
        if stages == 1 or counted:
            raise LimbeckError(
                f"{section}.{key} = {size} needs a pipeline_model_parallel_size above 1 and neither "
                "account_for_embedding_in_pipeline_split nor account_for_loss_in_pipeline_split; remove it, or change these."
            )
        if size % virtual:
            raise LimbeckError(
                f"{section}.{key} = {size} is no multiple of virtual_pipeline_model_parallel_size = {virtual}; use one."
            )
    rest, parts = layers + counted - sum(ends.values()), (stages - len(ends)) * virtual
    if rest % parts or rest < parts if parts else rest:
        others = f" other than the {' and '.join(key.split('_')[3] for key in ends)}" if ends else ""
        raise LimbeckError(
            f"{section}: Megatron gives each of {parts} (virtual) pipeline stages{others} as many layers, and {parts} does not "
            f"divide the {rest} of {name}; change pipeline_model_parallel_size or virtual_pipeline_model_parallel_size, set "
            "num_layers_in_first_pipeline_stage or num_layers_in_last_pipeline_stage, or set "
            "account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split, which each count as a layer."
        )
