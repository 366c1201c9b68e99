"""What every generator must do, as functions that a test of each generator calls, and a class of the tests that are the same.

``generator`` has the weights of ``model``, a float32 model of transformers in evaluation mode.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from limbeck.models import ModelSource, load_model, load_tokenizer
from limbeck.rollout import Completion, Generator, Prompt, SamplingParams
from limbeck.strategies.state import iter_model

SETTINGS = [
    SamplingParams(12),
    SamplingParams(12, temperature=0.7),
    SamplingParams(12, top_k=9),
    SamplingParams(12, top_p=0.8),
    SamplingParams(12, temperature=0.7, top_k=20, top_p=0.9),
    SamplingParams(12, temperature=0),
]


class SharedTests:
    """Tests of every generator. Subclasses run them with the fixtures ``generator``, ``wide_generator`` (which writes many
    answers at a time), ``model``, ``prompts`` and ``folder``, that of the model.
    """

    @pytest.mark.parametrize("sampling", SETTINGS, ids=str)
    def test_log_probs_are_those_of_the_sampling_distribution(self, generator, model, prompts, sampling):
        check_log_probs(generator, model, prompts, sampling)

    @pytest.mark.parametrize("sampling", [SETTINGS[0], SETTINGS[4]], ids=str)
    def test_samples_have_the_frequencies_of_the_sampling_distribution(self, wide_generator, model, prompts, sampling):
        check_distribution(wide_generator, model, prompts[0], sampling)

    def test_samples_depend_on_seed_row_and_position_only(self, generator, prompts):
        once = check_seeds(generator, prompts, SamplingParams(12, temperature=1.5, seed=3))
        longer = generator.generate(prompts, SamplingParams(20, temperature=1.5, seed=3))
        assert [written[:12] for written in tokens(longer)] == tokens(once)

    def test_each_prompt_gets_n_completions_in_order(self, generator, prompts):
        check_n(generator, prompts, SamplingParams(12, temperature=1.5))

    def test_completions_end_at_stop_ids_stop_strings_and_max_tokens(self, generator, folder, prompts):
        check_stops(generator, prompts[1], load_tokenizer(ModelSource(str(folder))).decode)

    def test_a_special_token_can_be_a_stop_string(self, generator, folder, model, prompts):
        token = load_tokenizer(ModelSource(str(folder))).convert_tokens_to_ids("<|user|>")
        check_special_stop(generator, model, prompts, token, "<|user|>")

    def test_offload_and_reload_keep_the_weights(self, generator, model, prompts):
        generator.offload()
        generator.reload()
        check_greedy(generator, model, prompts)


def load(folder: Path):
    """The model of a folder in float32 and evaluation mode."""
    return load_model(ModelSource(str(folder)), torch.float32).eval()


def check_new(generator: Generator, folder: Path) -> None:
    """A generator without weights writes greedily what the model of ``folder`` does, once it has its weights."""
    model = load(folder)
    generator.update_weights(iter_model(model), 7)
    completions = check_greedy(generator, model, make_prompts(model.config.vocab_size))
    assert {completion.version for completion in completions} == {7}
    assert len({token for completion in completions for token in completion.token_ids}) > 20


def check_padded(generator: Generator, folder: Path, num_tokens: int) -> None:
    """Rows of the output head beyond ``num_tokens``, which only pad it, are never written."""
    model = load(folder)
    with torch.no_grad():
        model.lm_head.weight[num_tokens:] = 100 * model.lm_head.weight[num_tokens:].sign()
    generator.update_weights(iter_model(model), 1)
    prompts = make_prompts(num_tokens)
    for sampling in (SamplingParams(8, temperature=0), SamplingParams(8, temperature=2.0)):
        assert max(max(row) for row in tokens(generator.generate(prompts, sampling))) < num_tokens


def make_prompts(vocab_size: int, lengths=(3, 20, 1, 9, 30, 8, 2), seed: int = 0) -> list[Prompt]:
    """Random prompts of these lengths; row ids are not their positions."""
    random = torch.Generator().manual_seed(seed)
    return [
        Prompt(tuple(torch.randint(5, vocab_size, (length,), generator=random).tolist()), 100 + i)
        for i, length in enumerate(lengths)
    ]


@torch.no_grad()
def written_by_transformers(model, prompt: Prompt, max_tokens: int) -> tuple[int, ...]:
    """The greedy completion of ``model.generate``."""
    ids = torch.tensor([prompt.token_ids])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens)
    return tuple(output[0, ids.shape[1] :].tolist())


@torch.no_grad()
def sampling_log_probs(model, prompt: Prompt, token_ids: tuple[int, ...], sampling: SamplingParams) -> torch.Tensor:
    """[tokens, vocabulary] by their definition, from one forward pass over prompt and completion."""
    ids = torch.tensor([[*prompt.token_ids, *token_ids]])
    logits = model(ids).logits[0, len(prompt.token_ids) - 1 : -1].double()
    if sampling.temperature > 0:
        logits = logits / sampling.temperature
    if sampling.top_k:
        smallest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1:
        probs = logits.softmax(-1)
        likelier = probs[:, None] > probs[:, :, None]  # [tokens, vocabulary, the others]
        enough = (probs[:, None] * likelier).sum(-1) >= sampling.top_p
        logits = logits.masked_fill(enough, -torch.inf)
    return logits.log_softmax(-1)


def tokens(completions: list[Completion]) -> list[tuple[int, ...]]:
    """What was written. Log-probabilities differ by rounding between batches."""
    return [completion.token_ids for completion in completions]


def check_greedy(generator: Generator, model, prompts: list[Prompt], max_tokens: int = 24) -> list[Completion]:
    """Greedy completions are those of ``model.generate``, in the order of the prompts."""
    completions = generator.generate(prompts, SamplingParams(max_tokens, temperature=0))
    assert [completion.prompt for completion in completions] == prompts
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.token_ids == written_by_transformers(model, prompt, max_tokens)
    return completions


def check_log_probs(generator: Generator, model, prompts: list[Prompt], sampling: SamplingParams) -> list[Completion]:
    """Log-probabilities are those of the sampling distribution."""
    completions = generator.generate(prompts, sampling)
    for completion in completions:
        expected = sampling_log_probs(model, completion.prompt, completion.token_ids, sampling)
        chosen = expected.gather(-1, torch.tensor(completion.token_ids)[:, None]).squeeze(-1)
        torch.testing.assert_close(
            torch.tensor(completion.log_probs, dtype=torch.float64), chosen, atol=1e-5, rtol=0, msg=str
        )
    return completions


def check_n(generator: Generator, prompts: list[Prompt], sampling: SamplingParams) -> None:
    """``n`` completions per prompt, in order and different; the first ones are those of a smaller ``n``."""
    several = generator.generate(prompts, replace(sampling, n=3))
    assert [completion.prompt for completion in several] == [prompt for prompt in prompts for _ in range(3)]
    assert len(set(tokens(several))) == len(several)
    assert tokens(several)[::3] == tokens(generator.generate(prompts, replace(sampling, n=1)))


def check_seeds(generator: Generator, prompts: list[Prompt], sampling: SamplingParams) -> list[Completion]:
    """Samples depend on the seed and the row id, and not on the other prompts."""
    once = generator.generate(prompts, sampling)
    assert generator.generate(prompts, sampling) == once
    assert [written for prompt in prompts for written in tokens(generator.generate([prompt], sampling))] == tokens(once)
    assert tokens(generator.generate(prompts[::-1], sampling)) == tokens(once)[::-1]
    others = generator.generate(prompts, replace(sampling, seed=sampling.seed + 1))
    others += generator.generate([replace(prompt, row_id=prompt.row_id + 50) for prompt in prompts], sampling)
    assert not set(tokens(once)) & set(tokens(others))
    return once


def check_stops(generator: Generator, prompt: Prompt, decode) -> None:
    """Token ids and strings end a completion with the token that completes them; max_tokens leaves it unfinished."""
    greedy = SamplingParams(16, temperature=0)
    (whole,) = generator.generate([prompt], greedy)
    assert (len(whole.token_ids), whole.finished) == (16, False)
    for count in (1, 5):
        (short,) = generator.generate([prompt], replace(greedy, max_tokens=count))
        assert (short.token_ids, short.finished) == (whole.token_ids[:count], False)
    end = whole.token_ids[6]
    first = whole.token_ids.index(end) + 1
    (stopped,) = generator.generate([prompt], replace(greedy, stop_token_ids=(end,)))
    assert (stopped.token_ids, stopped.finished) == (whole.token_ids[:first], True)
    texts = [decode(list(whole.token_ids[:count])) for count in range(17)]
    # It may begin within a token. Whether an unfinished character is text yet, engines decide differently.
    stop = next(text for text in texts[9:] if not text.endswith("\ufffd"))[-3:]
    first = next(count for count, text in enumerate(texts) if stop in text)
    for most in (16, first):  # a completion whose last token ends it is finished
        sampling = replace(greedy, max_tokens=most, stop_strings=("never written", stop))
        (stopped,) = generator.generate([prompt], sampling)
        assert (stopped.token_ids, stopped.finished) == (whole.token_ids[:first], True)


def check_special_stop(generator: Generator, model, prompts: list[Prompt], token: int, text: str) -> None:
    """A special token is part of the text in which stop strings are found. Changes the tied head of ``model``."""
    with torch.no_grad():  # so that the token is written often
        model.lm_head.weight[token] *= 4
    generator.update_weights([(name, tensor.detach()) for name, tensor in model.state_dict().items()], 2)
    sampling = SamplingParams(24, n=8)
    for stops in ((), (text,)):
        completions = generator.generate(prompts, replace(sampling, stop_strings=stops))
        before = [token in completion.token_ids[:-1] for completion in completions]
        assert any(before) == (not stops)
    assert any(completion.token_ids[-1] == token and completion.finished for completion in completions)


def check_distribution(generator: Generator, model, prompt: Prompt, sampling: SamplingParams) -> None:
    """The first tokens of many samples have the frequencies of the sampling distribution (chi-square)."""
    count = 4000
    completions = generator.generate([prompt], replace(sampling, max_tokens=1, n=count))
    first = torch.tensor([completion.token_ids[0] for completion in completions])
    expected = sampling_log_probs(model, prompt, (0,), sampling)[0].exp() * count
    found = first.bincount(minlength=len(expected)).double()
    assert not found[expected == 0].any()
    common = expected >= 5  # the others are one cell
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    found = torch.cat([found[common], found[~common].sum()[None]])
    cells = expected > 0
    statistic = ((found - expected)[cells] ** 2 / expected[cells]).sum().item()
    freedom = int(cells.sum()) - 1
    assert freedom >= 3
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5
