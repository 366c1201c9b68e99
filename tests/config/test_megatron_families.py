"""The model arguments of ModelOpt's examples (Megatron-LM's ``examples/post_training/modelopt/conf``) give the named models."""

import pytest
import torch

from limbeck.config import load_arguments
from limbeck.errors import LimbeckError
from limbeck.models import ModelSource
from limbeck.models.load import model_outline

COMMON = """--save-interval 100000 --micro-batch-size 1 --bf16 --no-masked-softmax-fusion --disable-bias-linear --normalization
    RMSNorm --no-rope-fusion --use-mcore-models --attention-dropout 0 --hidden-dropout 0 --train-iters 2 --lr 1e-3 --mock-data
    --seq-length 4096 --tokenizer-type NullTokenizer --limbeck-strategy fsdp2"""
GROUPED, UNTIED = "--group-query-attention --num-query-groups", "--untie-embeddings-and-output-weights"
QWEN = f"--swiglu --position-embedding-type rope --rotary-percent 1.0 --rotary-base 1000000 {GROUPED}"
QWEN3 = f"{QWEN} 8 --kv-channels 128 --qk-layernorm --max-position-embeddings 40960 --vocab-size 151936"
LLAMA = f"""--use-rotary-position-embeddings --no-position-embedding --swiglu --rotary-base 500000 --use-rope-scaling
    {GROUPED} 8 --max-position-embeddings 8192 --vocab-size 128256"""
HYBRID = f"{UNTIED} --squared-relu --kv-channels 128 {GROUPED} 8 --mamba-num-groups 8 --max-position-embeddings 8192"
NANO = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"

FAMILIES = {
    "Qwen2.5-0.5B": (
        f"""{QWEN} 2 --num-layers 24 --hidden-size 896 --ffn-hidden-size 4864 --num-attention-heads 14 --kv-channels 64
        --add-qkv-bias --max-position-embeddings 32768 --padded-vocab-size 151936 --make-vocab-size-divisible-by 1
        --vocab-size 151664""",
        "qwen2",
        494_032_768,
    ),
    "Qwen3-0.6B": (
        f"{QWEN3} --num-layers 28 --hidden-size 1024 --ffn-hidden-size 3072 --num-attention-heads 16",
        "qwen3",
        596_049_920,
    ),
    "Qwen3-30B-A3B": (
        f"""{QWEN3.replace("groups 8", "groups 4")} {UNTIED} --num-layers 48 --hidden-size 2048 --ffn-hidden-size 6144
        --num-attention-heads 32 --num-experts 128 --moe-ffn-hidden-size 768 --moe-router-topk 8
        --moe-layer-freq [1]*48 --moe-aux-loss-coeff 0""",
        "qwen3_moe",
        30_532_122_624,
    ),
    "Llama-3.2-1B": (
        f"{LLAMA} --num-layers 16 --hidden-size 2048 --ffn-hidden-size 8192 --num-attention-heads 32",
        "llama",
        1_235_814_400,
    ),
    "Nemotron-Nano-9B-v2": (
        f"""{HYBRID} --hidden-size 4480 --ffn-hidden-size 15680 --num-attention-heads 40 --hybrid-layer-pattern {NANO}
        --mamba-head-dim 80 --mamba-num-heads 128 --mamba-state-dim 128 --position-embedding-type none
        --export-model-type HybridModel --padded-vocab-size 131072 --vocab-size 131072 --tiktoken-pattern v2""",
        "nemotron_h",
        8_888_227_328,
    ),
}
REFUSED = {
    "Nemotron-H-8B": (
        f"""{HYBRID} --use-rotary-position-embeddings --rotary-percent 0.5 --no-position-embedding --hidden-size 4096
        --num-attention-heads 32 --hybrid-layer-pattern M-M*- --is-hybrid-model --vocab-size 131072""",
        "position_embedding_type = rope cannot be expressed as a nemotron_h model; it must be none, without "
        "use_rotary_position_embeddings",
    ),
    "DeepSeek-V2-Lite": (
        f"""{QWEN} 16 --num-layers 27 --hidden-size 2048 --num-attention-heads 16 --multi-latent-attention --kv-lora-rank 512
        --v-head-dim 128 --qk-head-dim 128 --qk-pos-emb-head-dim 64 --rotary-scaling-factor 40 --mscale 0.707
        --mscale-all-dim 0.707 --num-experts 64 --moe-layer-freq ([0]+[1]*26)
        --moe-token-drop-policy probs --vocab-size 102400""",
        "multi_latent_attention = True cannot be expressed .* other models need a checkpoint of Hugging Face",
    ),
    "Llama 4": (f"{LLAMA} --num-layers 48 --export-qk-l2-norm", "--export-qk-l2-norm describes GPT-OSS or Llama 4"),
    "GPT-OSS": (f"{QWEN} 8 --enable-gpt-oss --vocab-size 9", "--enable-gpt-oss describes GPT-OSS or Llama 4"),
}


def outline(flags: str) -> torch.nn.Module:
    args = load_arguments(f"{COMMON} {flags}".split(), "megatron").config.student.model_args
    return model_outline(ModelSource.from_args(args, "student"), torch.bfloat16)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_has_the_published_number_of_parameters(family: str) -> None:
    flags, model_type, parameters = FAMILIES[family]
    model = outline(flags)
    assert (model.config.model_type, model.num_parameters()) == (model_type, parameters)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_be_built_from_arguments_has_the_reason(family: str) -> None:
    flags, sentence = REFUSED[family]
    with pytest.raises(LimbeckError, match=sentence):
        outline(flags)
