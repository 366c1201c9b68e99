"""A model that answers every question with `` 7``."""

from pathlib import Path

import pytest
import torch
from tiny import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

WIDTH = 320  # one dimension for each token


@pytest.fixture(scope="session")
def seven(tmp_path_factory) -> Path:
    """Its layers do nothing, and its head maps each token to the next one of ``<|assistant|> 7<|end|>``.

    Its tokenizer and configuration name another end token than its chat template.
    """
    folder = make_model(tmp_path_factory.mktemp("seven") / "seven", layers=1, hidden=WIDTH)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    first, seven, end = tokenizer.convert_tokens_to_ids(["<|assistant|>", "7", "<|end|>"])
    following = torch.full((WIDTH,), tokenizer.convert_tokens_to_ids("0"))
    following[first], following[seven] = seven, end
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.copy_(torch.eye(WIDTH)[: model.config.vocab_size])
        model.lm_head.weight.zero_()
        model.lm_head.weight[following[: model.config.vocab_size], torch.arange(model.config.vocab_size)] = 1
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.pad_token_id
    tokenizer.eos_token = "<pad>"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
