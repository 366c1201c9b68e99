"""The generator ``hf`` writes what transformers writes, with the weights of the student."""

from dataclasses import replace
from pathlib import Path

import contract
import pytest
import torch
from tiny import make_model

from limbeck import registry
from limbeck.errors import LimbeckError
from limbeck.models import ModelSource, load_model, load_tokenizer, model_outline
from limbeck.rollout import Prompt, SamplingParams, hf
from limbeck.rollout.hf import HfGenerator, cache_bytes
from limbeck.strategies.state import iter_model
from limbeck.strategies.world import World

SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}

KINDS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen3 tied": {"head_dim": 8, "tie_word_embeddings": True},
    "qwen2 sliding": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "mistral": {"sliding_window": 5},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
    "gemma": {"head_dim": 8},
    "olmo2": {},
    "granite": {"attention_multiplier": 0.3, "logits_scaling": 2.0},
    "smollm3": {"no_rope_layers": [1, 0]},
    "gemma3_text": SLIDING,
    "nemotron_h": {"hybrid_override_pattern": "M-*M", "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2,
                   "ssm_state_size": 8, "chunk_size": 16},
    "phi3": {"resid_pdrop": 0.5},  # dropout, which must be off
}  # fmt: skip

DTYPES = (torch.float32, torch.bfloat16)


def needs_gpu(test):
    """Skips ``test`` without a GPU."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


def make_generator(
    folder: Path, slots: int = 3, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> HfGenerator:
    source = ModelSource(str(folder))
    return HfGenerator(model_outline(source, dtype), load_tokenizer(source), device, slots)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("qwen3"), kind="qwen3", head_dim=8, tie_word_embeddings=True)


@pytest.fixture
def generator(folder, model):
    """With three slots for seven prompts, sharing the memory of ``model``."""
    made = make_generator(folder)
    made.update_weights(iter_model(model), 1)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_completions_equal_those_of_transformers(kind, tmp_path):
    folder = make_model(tmp_path, kind=kind.split()[0], **KINDS[kind])
    contract.check_new(make_generator(folder), folder)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("llama", torch.bfloat16), ("gemma3_text", torch.float32), *(("nemotron_h", dtype) for dtype in DTYPES)],
    ids=str,
)
def test_the_bytes_of_a_cache_are_known_before_it_is_allocated(kind, dtype, tmp_path, monkeypatch):
    """llama has two groups of keys and values for four heads, gemma3 sliding windows, and nemotron_h states."""
    folder = make_model(tmp_path, kind=kind, **KINDS[kind])
    generator, model = make_generator(folder, dtype=dtype), contract.load(folder)
    generator.update_weights(iter_model(model), 1)
    caches = []

    def recorded(*sizes):
        caches.append(hf_cache(*sizes))
        return caches[-1]

    hf_cache = hf.SlotCache
    monkeypatch.setattr(hf, "SlotCache", recorded)
    for length, count, max_tokens in ((9, 2, 1), (70, 1, 3), (20, 4, 110)):
        prompts = contract.make_prompts(model.config.vocab_size, (length, 2))
        generator.generate(prompts, SamplingParams(max_tokens, n=count))
        outline = model_outline(ModelSource(str(folder)), dtype)
        expected = cache_bytes(outline, min(3, 2 * count), length + max_tokens - 1)
        cache = caches.pop()
        states = [*cache.recurrent.windows.values(), *cache.recurrent.states.values()]
        tensors = [*(tensor for pair in cache._layers.values() for tensor in pair), *states]
        assert sum(tensor.nbytes for tensor in tensors) == cache.nbytes == expected > 0


def test_samples_of_a_prompt_begin_with_the_state_of_the_prompt(tmp_path):
    folder = make_model(tmp_path, kind="nemotron_h", **KINDS["nemotron_h"])
    generator, model = make_generator(folder), contract.load(folder)
    generator.update_weights(iter_model(model), 1)
    prompts = contract.make_prompts(model.config.vocab_size, (1, 9, 1, 9, 1))
    contract.check_log_probs(generator, model, prompts, SamplingParams(7, n=4))


@pytest.fixture
def wide_generator(folder, model):
    made = make_generator(folder, slots=256)
    made.update_weights(iter_model(model), 1)
    return made


class TestContract(contract.SharedTests):
    """The tests of every generator."""


def test_samples_do_not_depend_on_the_number_of_slots(folder, model, generator, prompts):
    sampling = SamplingParams(12, temperature=1.5, seed=3)
    once = generator.generate(prompts, sampling)
    for slots in (1, 2, 64):
        other = make_generator(folder, slots)
        other.update_weights(iter_model(model), 1)
        assert contract.tokens(other.generate(prompts, sampling)) == contract.tokens(once)


def test_samples_of_a_prompt_continue_it_whether_they_were_prefilled_or_copied(generator, model, prompts):
    contract.check_log_probs(generator, model, prompts, SamplingParams(9, n=4))


def test_rows_that_end_early_make_room_for_others(generator, model, prompts):
    end = model.config.eos_token_id
    with torch.no_grad():  # the tied embedding of the end token grows, so that it becomes likely
        model.lm_head.weight[end] *= 3
    completions = contract.check_log_probs(generator, model, prompts, SamplingParams(40, n=4))
    assert len({len(completion.token_ids) for completion in completions}) > 5
    for completion in completions:
        assert end not in completion.token_ids[:-1]
        assert completion.finished == (completion.token_ids[-1] == end)
        assert completion.finished or len(completion.token_ids) == 40
    assert {completion.finished for completion in completions} == {True, False}


def test_weights_that_change_in_place_are_used_without_an_update(generator, model, prompts):
    before = contract.check_greedy(generator, model, prompts)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2).add_(0.03)
    assert contract.check_greedy(generator, model, prompts) != before


def test_the_student_trains_while_its_memory_is_shared(generator, model, prompts):
    model.train()
    generator.generate(prompts, SamplingParams(4))
    assert model.training
    ids = torch.tensor([prompts[1].token_ids])
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    contract.check_greedy(generator, model.eval(), prompts)


def test_an_update_never_writes_to_weights_that_are_shared(generator, folder, model, prompts, tmp_path):
    other = contract.load(make_model(tmp_path, kind="qwen3", head_dim=8, tie_word_embeddings=True, seed=5))
    generator.update_weights(iter_model(other), 2)
    contract.check_greedy(generator, other, prompts)
    generator.update_weights(iter_model(other.double()), 3)  # into copies
    contract.check_greedy(generator, other, prompts)
    generator.update_weights(iter_model(model), 4)
    generator.update_weights(iter_model(other), 5)
    contract.check_greedy(generator, other, prompts)
    for parameter, expected in zip(model.parameters(), contract.load(folder).parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_weights_of_another_dtype_are_copied_into_the_same_memory(folder, model, prompts):
    generator = make_generator(folder, dtype=torch.float64)
    generator.update_weights(iter_model(model), 1)
    before = contract.check_greedy(generator, contract.load(folder).double(), prompts)
    places = [parameter.data_ptr() for parameter in generator.model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2).add_(0.03)
    assert contract.check_greedy(generator, contract.load(folder).double(), prompts) == before
    generator.update_weights(iter_model(model), 2)
    assert [parameter.data_ptr() for parameter in generator.model.parameters()] == places
    contract.check_greedy(generator, model.double(), prompts)


def test_one_name_of_a_tied_head_is_enough(generator, model, prompts):
    for left_out in ("lm_head.weight", "model.embed_tokens.weight"):
        weights = {name: tensor for name, tensor in iter_model(model) if name != left_out}
        assert len(weights) == len(model.state_dict()) - 1
        generator.update_weights(weights.items(), 2)
        contract.check_greedy(generator, model, prompts[:1])


def test_weights_that_do_not_fit_the_model_are_refused(generator, model):
    weights = dict(model.state_dict())
    norm = "model.norm.weight"
    with pytest.raises(LimbeckError, match=rf"did not receive {norm} \(1 weights of Qwen3ForCausalLM\)"):
        generator.update_weights([item for item in weights.items() if item[0] != norm], 1)
    with pytest.raises(
        LimbeckError, match=r"received the weight model.norm.scale, which Qwen3ForCausalLM does not have"
    ):
        generator.update_weights([*weights.items(), ("model.norm.scale", weights[norm])], 1)
    with pytest.raises(LimbeckError, match=rf"{norm} with the shape \[2\] in place of \[32\]"):
        generator.update_weights({**weights, norm: torch.ones(2)}.items(), 1)


def test_a_generator_without_weights_is_refused(folder, prompts):
    with pytest.raises(LimbeckError, match="no weights yet; call update_weights"):
        make_generator(folder).generate(prompts, SamplingParams(4))


def test_rows_that_pad_the_head_are_never_written(tmp_path):
    folder = make_model(tmp_path / "padded", vocab_size=384)  # more than the tokenizer has
    contract.check_padded(make_generator(folder), folder, len(load_tokenizer(ModelSource(str(folder)))))


def test_no_prompts_give_no_completions(generator):
    assert generator.generate([], SamplingParams(4)) == []


def test_a_completion_ends_where_the_models_positions_do(generator, model, prompts):
    positions = model.config.max_position_embeddings
    long = contract.make_prompts(model.config.vocab_size, lengths=(positions - 2,))
    (completion,) = generator.generate(long, SamplingParams(10, temperature=0))
    assert (len(completion.token_ids), completion.finished) == (2, False)
    (too_long,) = contract.make_prompts(model.config.vocab_size, lengths=(positions,))
    with pytest.raises(
        LimbeckError, match=rf"the prompt of row 100 has {positions} tokens, .* at most {positions} tokens"
    ):
        generator.generate([*prompts, too_long], SamplingParams(1))
    with pytest.raises(LimbeckError, match="the prompt of row 4 has no tokens"):
        generator.generate([Prompt((), 4)], SamplingParams(1))


def test_prompts_of_very_different_lengths_are_prefilled_in_groups(folder, model, prompts, monkeypatch):
    monkeypatch.setattr("limbeck.rollout.hf._PREFILL_TOKENS", 40)
    generator = make_generator(folder, slots=64)
    generator.update_weights(iter_model(model), 1)
    lengths = (60, 19, 18, 17, 5, 1, 2, 60, 20)
    contract.check_greedy(generator, model, contract.make_prompts(model.config.vocab_size, lengths))


def test_a_model_with_another_state_is_refused(tmp_path):
    changes = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8}
    folder = make_model(tmp_path, kind="qwen3_next", num_experts=0, **changes)
    with pytest.raises(LimbeckError, match="Qwen3NextForCausalLM has linear_attention; use another generator"):
        make_generator(folder)


def test_a_soft_cap_in_the_attention_is_refused(tmp_path):
    folder = make_model(tmp_path, kind="gemma2", **SLIDING)
    generator = make_generator(folder)
    generator.update_weights(iter_model(contract.load(folder)), 1)
    with pytest.raises(LimbeckError, match="Gemma2Attention has a soft-cap or sinks"):
        generator.generate([Prompt((5, 6, 7), 0)], SamplingParams(1))


def test_a_configuration_that_other_models_share_is_not_changed(folder):
    source = ModelSource(str(folder))
    outline = model_outline(source, torch.float32)
    before = outline.config.to_dict(), outline.config._attn_implementation, outline.training
    HfGenerator(outline, load_tokenizer(source))
    assert (outline.config.to_dict(), outline.config._attn_implementation, outline.training) == before


@needs_gpu
def test_offload_frees_the_gpu(folder, model, prompts):
    generator = make_generator(folder, dtype=torch.bfloat16, device="cuda")
    generator.update_weights(iter_model(model), 1)
    settings = SamplingParams(12, seed=1)
    before, held = generator.generate(prompts, settings), torch.cuda.memory_allocated()
    generator.offload()
    assert torch.cuda.memory_allocated() < held
    assert all(parameter.device.type == "cpu" for parameter in generator.model.parameters())
    generator.reload()
    assert generator.generate(prompts, settings) == before
    generator.update_weights(iter_model(model), 2)
    assert generator.generate(prompts, settings) == [replace(completion, version=2) for completion in before]


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_completions_equal_those_of_transformers_on_a_gpu(kind, tmp_path):
    folder = make_model(tmp_path, kind=kind.split()[0], **KINDS[kind])
    model, generator = contract.load(folder), make_generator(folder, device="cuda")
    generator.update_weights(iter_model(model), 1)
    contract.check_greedy(generator, model, contract.make_prompts(model.config.vocab_size))
    assert generator._records_graphs or kind in ("qwen3_moe", "mixtral")  # whose experts may be chosen on the host


def test_the_registered_generator_has_the_students_structure(configure):
    config = configure()
    student = load_model(ModelSource.from_args(config.student.model_args, "student"), torch.float32).eval()
    generator = registry.GENERATORS.get("hf")(config, World(0, 1, torch.device("cpu")))
    generator.update_weights(iter_model(student), 1)
    contract.check_greedy(generator, student, contract.make_prompts(student.config.vocab_size))
