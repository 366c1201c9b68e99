"""What does not fit in memory gives one sentence before or instead of a crash."""

import pytest
import torch
from transformers import Qwen2Config

from limbeck.errors import LimbeckError
from limbeck.models import ModelSource, available_memory, explain_oom, load_model


@pytest.mark.skipif(available_memory() is None, reason="this system does not say what memory is left")
def test_a_model_larger_than_what_is_left_is_refused_before_it_is_made():
    huge = {"model_type": "qwen2", "hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 200}
    sentence = r"the teacher None takes [\d,.]+ GB of memory to load, and [\d,.]+ GB are left"
    with pytest.raises(LimbeckError, match=sentence):
        load_model(ModelSource(None, "teacher", from_scratch=True, config_kwargs=huge), torch.bfloat16)


@pytest.mark.skipif(available_memory() is None, reason="this system does not say what memory is left")
def test_a_quantised_model_is_not_judged_by_its_full_size(tmp_path):
    huge = {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 200, "num_attention_heads": 128}
    quantised = {"quantization_config": {"quant_method": "nothing-known", "bits": 4}}
    Qwen2Config(**huge, **quantised).save_pretrained(tmp_path)
    with pytest.raises(LimbeckError) as refused:  # for what comes next: there are no weights
        load_model(ModelSource(str(tmp_path), "teacher"), torch.bfloat16)
    assert "of memory to load" not in str(refused.value)


def test_an_allocation_that_fails_names_what_was_done_and_what_to_do():
    sentence = r"out of memory while it slept \(.*\); wake it\."
    with pytest.raises(LimbeckError, match=sentence), explain_oom("it slept", "wake it"):
        torch.empty(1 << 60, dtype=torch.int8)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="a size of tensors"), explain_oom("it slept", "wake it"):
        raise RuntimeError("a size of tensors")


def test_a_checkpoint_that_is_cut_short_is_told(tmp_path):
    small = {"model_type": "qwen2", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    small |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    model = load_model(ModelSource(None, from_scratch=True, config_kwargs=small), torch.float32)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(
        LimbeckError, match=r"the teacher .* is incomplete or damaged \(.*\); copy or download it again"
    ):
        load_model(ModelSource(str(tmp_path), "teacher"), torch.float32)
