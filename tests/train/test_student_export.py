"""The student as a Hugging Face folder, in files of whole layers that the ranks share."""

import json
import re

import pytest
import torch
from tiny import make_model
from transformers import AutoConfig, AutoModelForCausalLM

from limbeck.strategies.world import World
from limbeck.train.student_export import StudentExport


@pytest.mark.parametrize("tied", [False, True])
def test_ranks_write_whole_layers_that_transformers_loads(tmp_path, monkeypatch, tied):
    monkeypatch.setattr("limbeck.train.student_export._LEAST", 1000)
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model", layers=3, tie_word_embeddings=tied))
    export = StudentExport(model, torch.bfloat16, 0)
    weights = dict(model.state_dict())
    on_host = {name: weights[name].clone() for name in list(weights)[:3]}
    out, written = tmp_path / "out", {}
    out.mkdir()
    export.write_configuration(out)
    for rank in range(2):
        share = export.collect(weights.items(), World(rank, 2, torch.device("cpu")), on_host)
        held = {name: tensor for tensors in share.tensors.values() for name, tensor in tensors.items()}
        assert all(held[name] is on_host[name] for name in held.keys() & on_host.keys()), "not copied again"
        assert not any(held[name].data_ptr() == weights[name].data_ptr() for name in held)
        written |= export.write_weights(out, share)
    export.write_index(out, written)
    files = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(files.values())) == share.files == len(list(out.glob("model-*-of-*.safetensors"))) > 2
    layers = {(re.match(r".*\.\d+\.", name), file) for name, file in files.items() if ".layers." in name}
    assert len({file for _, file in layers}) == len({(layer and layer[0], file) for layer, file in layers})
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert AutoConfig.from_pretrained(out).dtype == loaded.dtype == torch.bfloat16
    for name, tensor in weights.items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor.bfloat16(), rtol=0, atol=0)


def test_a_small_student_is_one_file_of_the_main_process(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model"))
    export = StudentExport(model, torch.float32, model.num_parameters())
    shares = [export.collect(model.state_dict().items(), World(rank, 2, torch.device("cpu")), {}) for rank in range(2)]
    assert export.write_weights(tmp_path, shares[0]).keys() == {"model.safetensors"}
    assert export.write_weights(tmp_path, shares[1]) == {}


def test_experts_are_written_as_the_hub_has_them(tmp_path):
    """transformers keeps the experts of a layer in one parameter, and converts their names and shapes when it saves."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = MixtralForCausalLM(MixtralConfig(**sizes, vocab_size=32, num_hidden_layers=2, num_local_experts=2))
    export = StudentExport(model, torch.float32, model.num_parameters())
    (tmp_path / "out").mkdir()
    export.write_configuration(tmp_path / "out")
    share = export.collect(model.state_dict().items(), World(0, 1, torch.device("cpu")), {})
    written = export.write_weights(tmp_path / "out", share)
    assert "model.layers.1.block_sparse_moe.experts.1.w2.weight" in written["model.safetensors"]["bytes"]
    loaded = MixtralForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)


def test_ranks_share_the_student_evenly(tmp_path, monkeypatch):
    monkeypatch.setattr("limbeck.train.student_export._LEAST", 1000)
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model", layers=8, vocab_size=300))
    export = StudentExport(model, torch.float32, model.num_parameters())
    weights = model.state_dict()
    layer = sum(tensor.nbytes for name, tensor in weights.items() if ".layers.0." in name)
    largest = max(layer, *(tensor.nbytes for tensor in weights.values()))
    shares = [export.collect(weights.items(), World(rank, 4, torch.device("cpu")), {}) for rank in range(4)]
    held = [sum(tensor.nbytes for file in share.tensors.values() for tensor in file.values()) for share in shares]
    assert max(held) <= sum(held) / 4 + largest
