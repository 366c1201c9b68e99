"""A plug-in for tests, after ``megatron_on_cpu``: lets Megatron-Bridge be imported without Transformer Engine.

Every name in Transformer Engine is a mock while Bridge is imported, and Megatron's own modules are imported before. Also
registers a bridge of one's own, for an architecture that Bridge has none for.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

from megatron.core import utils
from packaging.version import Version

from limbeck.strategies.megatron.core import import_megatron


class Mocks(MetaPathFinder, Loader):
    def find_spec(self, name, path, target=None):
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "transformer_engine" else None

    def create_module(self, spec):
        return MagicMock(__path__=[], __spec__=spec, __name__=spec.name)

    def exec_module(self, module): ...


def import_bridge() -> None:
    finder, before = Mocks(), utils._te_version
    utils._te_version = Version("2.2.0")
    sys.meta_path.append(finder)
    try:
        import megatron.bridge  # noqa: F401
    finally:
        sys.meta_path.remove(finder)
        utils._te_version = before
        for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
            del sys.modules[name]


import_megatron()
import_bridge()

from megatron.bridge.models.conversion import param_mapping  # noqa: E402
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry  # noqa: E402
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from transformers import ArceeForCausalLM  # noqa: E402

OURS, THEIRS = "decoder.layers.*.", "model.layers.*."


@MegatronModelBridge.register_bridge(source=ArceeForCausalLM, target=GPTModel, model_type="arcee")
class ArceeBridge(MegatronModelBridge):
    def provider_bridge(self, hf_pretrained):
        provider = super().provider_bridge(hf_pretrained)
        provider.normalization, provider.hidden_dropout = "RMSNorm", 0.0
        return provider

    def mapping_registry(self):
        names = {
            "embedding.word_embeddings.weight": "model.embed_tokens.weight",
            "decoder.final_layernorm.weight": "model.norm.weight",
            "output_layer.weight": "lm_head.weight",
            f"{OURS}self_attention.linear_qkv.layer_norm_weight": f"{THEIRS}input_layernorm.weight",
            f"{OURS}mlp.linear_fc1.layer_norm_weight": f"{THEIRS}post_attention_layernorm.weight",
        }
        mappings = [param_mapping.AutoMapping(ours, theirs) for ours, theirs in names.items()]
        for kind, in_rows in (("weight", param_mapping.RowParallelMapping), ("bias", param_mapping.ReplicatedMapping)):
            qkv = (f"{THEIRS}self_attn.{x}_proj.{kind}" for x in "qkv")
            mappings += [
                param_mapping.QKVMapping(f"{OURS}self_attention.linear_qkv.{kind}", *qkv),
                in_rows(f"{OURS}self_attention.linear_proj.{kind}", f"{THEIRS}self_attn.o_proj.{kind}"),
                param_mapping.ColumnParallelMapping(f"{OURS}mlp.linear_fc1.{kind}", f"{THEIRS}mlp.up_proj.{kind}"),
                in_rows(f"{OURS}mlp.linear_fc2.{kind}", f"{THEIRS}mlp.down_proj.{kind}"),
            ]
        return MegatronMappingRegistry(*mappings)
