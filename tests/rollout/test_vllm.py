"""The generator ``vllm`` passes the contract of generators; ``make test-vllm`` runs these tests with vLLM's CPU build."""

import sys
from importlib.util import find_spec

import contract
import pytest
import torch
from runs import launch, metrics, rows
from tiny import make_model

from limbeck import DistillPipeline, registry
from limbeck.config import load_mapping
from limbeck.errors import LimbeckError
from limbeck.models import ModelSource, load_tokenizer, model_outline
from limbeck.rollout import Prompt, SamplingParams
from limbeck.rollout.vllm import VllmGenerator
from limbeck.strategies.state import iter_model
from limbeck.strategies.world import World


def needs_vllm(test):
    """Skips ``test``, a function or a class, without vLLM."""
    return pytest.mark.vllm(pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make test-vllm")(test))


def make_student(folder, kind="qwen3", **changes):
    """vLLM refuses heads of 16 dimensions on a CPU. Smaller weights: its kernels round large logits more coarsely."""
    return make_model(
        folder,
        kind=kind,
        **{"head_dim": 32, "initializer_range": 0.01, "hidden": 128 if kind == "qwen2" else 32, **changes},
    )


def writing(student):
    """Changes of a run in which ``student`` writes every answer."""
    return {
        "student_pretrain": str(student),
        "save_steps": 0,
        "eval_steps": 0,
        "distill_loss_weight": 1.0,
        "rollout.max_new_tokens": 12,
        "rollout.temperature": 0.0,
    }


def start(folder, **changes):
    source = ModelSource(str(folder))
    return VllmGenerator(
        model_outline(source, torch.float32), load_tokenizer(source), **{"max_model_len": 256, **changes}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_student(tmp_path_factory.mktemp("qwen3"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return make_student(tmp_path_factory.mktemp("qwen2"), "qwen2", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def engine(folder):
    """A generator that tests give new weights. A process has one engine: the tests that start another come before or last."""
    return start(folder)


@pytest.fixture
def generator(engine, model):
    engine.update_weights(iter_model(model), 1)
    return engine


@pytest.fixture
def wide_generator(generator):
    return generator


@needs_vllm
class TestNewEngines:
    @pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
    def test_greedy_completions_equal_those_of_transformers(self, kind, tmp_path):
        folder = make_student(tmp_path, kind, tie_word_embeddings=kind == "qwen3")
        contract.check_new(start(folder), folder)

    def test_rows_that_pad_the_head_are_never_written(self, tmp_path):
        folder = make_student(tmp_path / "padded", "llama", vocab_size=384)  # more than the tokenizer has
        generator = start(folder)
        with pytest.raises(LimbeckError, match="no weights yet; call update_weights"):
            generator.generate([Prompt((5,), 0)], SamplingParams(1))
        contract.check_padded(generator, folder, len(load_tokenizer(ModelSource(str(folder)))))


class VllmTests(contract.SharedTests):
    """Tests of an engine in the training process, and of one in others."""

    def test_an_update_replaces_the_weights_of_a_tied_head_too(self, generator, model, prompts):
        before = contract.check_greedy(generator, model, prompts)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.2).add_(0.03)
        weights = dict(model.state_dict())
        for left_out in ("", "lm_head.weight", "model.embed_tokens.weight"):
            generator.update_weights(((n, w) for n, w in weights.items() if n != left_out), 2)
            assert contract.check_greedy(generator, model, prompts) != before
            contract.check_log_probs(generator, model, prompts, contract.SETTINGS[0])

    def test_a_completion_ends_where_the_positions_do(self, generator, model, prompts):
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
        with pytest.raises(LimbeckError, match=r"cannot sample at temperature 0\.005"):
            generator.generate(prompts, SamplingParams(1, temperature=0.005))
        assert generator.generate([], SamplingParams(4)) == []

    def test_other_prompts_than_those_given_are_noticed(self, generator, prompts, monkeypatch):
        generate = generator._llm.generate
        changed = lambda given, *rest, **options: generate([{"prompt_token_ids": [1]}, *given[1:]], *rest, **options)  # noqa: E731
        monkeypatch.setattr(generator._llm, "generate", changed)
        with pytest.raises(
            LimbeckError, match="vLLM continued other tokens than the prompt of row 100: 1 tokens in place of 3"
        ):
            generator.generate(prompts, SamplingParams(2))


@needs_vllm
class TestContract(VllmTests):
    @pytest.mark.parametrize(
        ("name", "sent", "sentence"),
        [
            ("model.norm.weight", {}, r"did not receive model.norm.weight \(1 weights of Qwen3ForCausalLM\)"),
            ("model.norm.scale", {"model.norm.scale": torch.ones(32)}, "received the weight model.norm.scale, which"),
            ("model.norm.weight", {"model.norm.weight": torch.ones(2)}, r"with the shape \[2\] in place of \[32\]"),
        ],
    )
    def test_weights_that_do_not_fit_the_model_are_refused(self, generator, model, monkeypatch, name, sent, sentence):
        load = lambda method, kwargs: dict(kwargs["weights_iterator"])  # noqa: E731
        monkeypatch.setattr(generator._llm, "collective_rpc", load)  # the engine is left as it is
        monkeypatch.setattr(generator, "_has_failed", False)
        with pytest.raises(LimbeckError, match=sentence):
            generator.update_weights({**{n: w for n, w in iter_model(model) if n != name}, **sent}.items(), 2)
        with pytest.raises(LimbeckError, match="has failed or was ended"):
            generator.generate([Prompt((5,), 0)], SamplingParams(1))

    def test_an_engine_that_fails_in_a_batch_is_reported(self, generator, prompts, monkeypatch):
        engine = generator._llm.llm_engine
        step, steps = engine.step, iter(range(4))

        def failing():
            if next(steps, None) is None:
                raise RuntimeError("out of order")
            return step()

        monkeypatch.setattr(engine, "step", failing)
        monkeypatch.setattr(generator, "_has_failed", False)
        with pytest.raises(
            LimbeckError, match=r"vLLM failed while it wrote 7 completions.*: RuntimeError: out of order"
        ):
            generator.generate(prompts, SamplingParams(12))
        with pytest.raises(LimbeckError, match="has failed or was ended"):
            generator.generate(prompts, SamplingParams(12))
        engine.abort_request(list(engine.output_processor.request_states), internal=True)

    def test_the_process_is_left_as_it_was(self, folder):
        torch.manual_seed(5)
        threads, expected = torch.get_num_threads(), torch.rand(1)
        torch.manual_seed(5)
        with pytest.raises(
            LimbeckError, match=r"cannot run the student with these rollout.generator_kwargs: TypeError: .*spede"
        ):
            start(folder, arguments={"spede": 3})
        first, _ = start(folder, max_model_len=64), start(folder, max_model_len=64)
        assert torch.equal(torch.rand(1), expected)
        torch.set_num_threads(threads + 1)
        assert torch.get_num_threads() == threads + 1
        torch.set_num_threads(threads)
        with pytest.raises(LimbeckError, match="has failed or was ended"):
            first.update_weights(iter_model(contract.load(folder)), 1)


@needs_vllm
@pytest.mark.processes
class TestRuns:
    @pytest.mark.parametrize("ranks", [1, 2])
    def test_twenty_steps_have_the_losses_of_hf(self, alone, settings, tied, tmp_path, ranks):
        changes = {**writing(tied), "max_steps": 20, "rollout.offload": True}
        hf = metrics(alone(**changes, **rows(4, 2)), "train/loss")
        config = settings(**changes, **rows(4, 2 // ranks), **{"rollout.generator": "vllm"})
        if ranks == 1:
            DistillPipeline(load_mapping(config).config).run()
        else:
            assert "Traceback" not in launch(config, tmp_path, ranks)
        assert len(hf) == 20
        assert metrics(tmp_path / "out", "train/loss") == pytest.approx(hf, rel=1e-4)


def test_a_missing_vllm_names_the_extra(configure, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    config = configure(distill_loss_weight=1.0, **{"rollout.generator": "vllm"})
    with pytest.raises(LimbeckError, match=r"needs vLLM; install it with: pip install 'limbeck\[vllm\]'"):
        registry.GENERATORS.get("vllm")(config, World(0, 1, torch.device("cpu")))


@pytest.mark.parametrize(
    ("generator", "arguments", "sentence"),
    [
        ("vllm", {"tensor_parallel_size": 2}, "generator_kwargs.tensor_parallel_size is set by the generator vllm"),
        ("hf", {"slot": 2}, "generator_kwargs.slot is no argument of the generator hf; set slots"),
        ("hf", {"slots": 0}, "generator_kwargs.slots = 0 is no positive number"),
        ("hf", {"copy": "no"}, "generator_kwargs.copy = no is neither auto nor true or false"),
    ],
)
def test_arguments_without_effect_are_refused(configure, generator, arguments, sentence):
    changes = {"distill_loss_weight": 1.0, "rollout.generator": generator, "rollout.generator_kwargs": arguments}
    with pytest.raises(LimbeckError, match=sentence):
        registry.GENERATORS.get(generator)(configure(**changes), World(0, 1, torch.device("cpu")))
