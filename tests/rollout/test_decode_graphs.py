"""Decoding passes that are recorded and replayed compute what other passes do. CUDA graphs themselves need a GPU, where
test_hf.py uses them; here a stand-in repeats the pass on the recorded inputs.
"""

import contract
import pytest
import torch
from test_hf import KINDS, make_generator
from tiny import make_model
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck.rollout import SamplingParams, decode_graphs
from limbeck.rollout.decode_graphs import DecodeGraphs
from limbeck.rollout.kv_cache import SlotCache
from limbeck.strategies.state import iter_model

aten = torch.ops.aten
READ = (aten.item, aten._local_scalar_dense, aten.is_nonzero, aten.nonzero, aten.masked_select, aten.equal)
WITHOUT_EXPERTS = [kind for kind in KINDS if "moe" not in kind and kind != "mixtral"]
UNLIKE = {"qwen3 tied", "qwen2 sliding", "gemma3_text", "nemotron_h"}  # each in what a pass reads and writes


class Capturing(TorchDispatchMode):
    """Fails where a stream that is being captured would: when a value is read."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in READ:
            raise RuntimeError("operation not permitted when stream is capturing\nand more lines")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def recorded(monkeypatch):
    """How often each recorded pass was replayed."""
    counts = []

    def record(compute):
        result, number = torch.zeros(64, 1000), len(counts)
        counts.append(0)

        def replay():
            counts[number] += 1
            with Capturing():
                logits = compute()
            result[: len(logits), : logits.shape[1]] = logits

        return replay, result

    monkeypatch.setattr(decode_graphs, "record", record)
    return counts


def recording(folder, model, **options):
    generator = make_generator(folder, **options)
    generator._records_graphs = True
    generator.update_weights(iter_model(model), 1)
    return generator


@pytest.mark.parametrize(
    "kind", [kind if kind in UNLIKE else pytest.param(kind, marks=pytest.mark.slow) for kind in WITHOUT_EXPERTS]
)
def test_replayed_passes_write_what_transformers_writes(kind, tmp_path, recorded):
    folder = make_model(tmp_path, kind=kind.split()[0], **KINDS[kind])
    model = contract.load(folder)
    contract.check_greedy(recording(folder, model), model, contract.make_prompts(model.config.vocab_size))
    assert max(recorded) > 20


def test_passes_of_one_shape_share_a_recording(tmp_path, recorded, monkeypatch):
    monkeypatch.setattr(decode_graphs, "_BLOCK", 64)
    folder = make_model(tmp_path, kind="qwen3", head_dim=8, tie_word_embeddings=True, max_position_embeddings=256)
    model = contract.load(folder)
    with torch.no_grad():  # the end token becomes likely, so that the number of rows changes
        model.lm_head.weight[model.config.eos_token_id] *= 3
    prompts = contract.make_prompts(model.config.vocab_size, (60, 3, 9, 40, 1, 12))
    completions = contract.check_log_probs(
        recording(folder, model, slots=12), model, prompts, SamplingParams(90, n=4, seed=1)
    )
    assert len({len(completion.token_ids) for completion in completions}) > 8
    assert 2 <= len(recorded) <= 5 * 3  # 1, 2, 4, 8 or 12 rows; 64, 128 or 192 positions
    assert sum(recorded) > 50


def test_experts_that_are_chosen_on_the_host_are_written_without_graphs(tmp_path, recorded):
    folder = make_model(tmp_path, kind="mixtral", **KINDS["mixtral"])
    model = contract.load(folder)
    model.set_experts_implementation("eager")
    prompts = contract.make_prompts(model.config.vocab_size)
    generator = recording(folder, model)
    generator.model.set_experts_implementation("eager")
    with pytest.warns(
        UserWarning, match=r"without CUDA graphs.* each pass waits for a value of the GPU \(\w+\)"
    ) as warned:
        contract.check_greedy(generator, model, prompts)
        contract.check_greedy(generator, model, prompts)
    assert sum("CUDA graphs" in str(warning.message) for warning in warned) == 1
    assert recorded == []


@pytest.mark.parametrize("wait", [lambda x: x[x > 0], lambda x: x.to("meta"), lambda x: bool(x.sum())])
def test_a_pass_that_waits_is_found_before_it_is_recorded(wait, recorded):
    def forward(ids, positions, slots):
        wait(positions)
        return torch.zeros(len(ids), 5)

    graphs = DecodeGraphs(forward, SlotCache(2, 64), records=True)
    with pytest.warns(UserWarning, match="waits for a value of the GPU"):
        for _ in range(2):
            graphs.logits(torch.ones(2, 1, dtype=torch.long), torch.ones(2, dtype=torch.long), 1)
    assert recorded == []


def test_a_pass_that_cannot_be_recorded_is_computed(tmp_path, monkeypatch):
    def record(compute):
        with Capturing():
            return torch.ones(1).item()

    monkeypatch.setattr(decode_graphs, "record", record)
    folder = make_model(tmp_path, kind="llama")
    model = contract.load(folder)
    with pytest.warns(UserWarning, match=r"cannot record this model: operation not permitted.*capturing\."):
        contract.check_greedy(recording(folder, model), model, contract.make_prompts(model.config.vocab_size))
