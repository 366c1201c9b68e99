"""Compares the generator ``hf`` with ``model.generate`` as TRL's GKDTrainer calls it, one padded batch per micro-batch, and
with vLLM where it is installed.

    python benchmarks/rollout.py                    # on a GPU where there is one, in bf16
    python benchmarks/rollout.py --micro-batch 16 --rounds 5
    python benchmarks/rollout.py --quick --json rollout.json    # one round; a part of make gpu
    .venv-vllm/bin/python benchmarks/rollout.py     # beside vLLM's CPU build; make test-vllm creates the environment
    .venv-vllm/bin/python benchmarks/rollout.py --compile

All sample from the same model at temperature 1 for the same prompts of mixed lengths. 1 token in 64 is an end token, so that
completions have different lengths: 55 tokens on average and at most 128. Tokens after a row's end are not counted. The sides
alternate, so that other load on the machine affects all; ``limbeck`` is measured beside ``model.generate``, and again beside
vLLM, which takes long to start. ``vllm`` is the generator of that name, which computes log-probabilities as ``hf`` does;
``vllm alone`` is ``vllm.LLM`` without them and without seeds.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from side import write_json
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from limbeck.rollout import Prompt, SamplingParams
from limbeck.rollout.hf import HfGenerator
from limbeck.rollout.vllm import VllmGenerator

VOCAB, PAD = 8192, 0
ENDS = list(range(1, 1 + VOCAB // 64))
MODEL = LlamaConfig(
    hidden_size=256, num_hidden_layers=4, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=4,
    vocab_size=VOCAB, max_position_embeddings=2048, bos_token_id=None, eos_token_id=ENDS, pad_token_id=PAD,
    tie_word_embeddings=False,
)  # fmt: skip


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One word per token."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token=f"w{VOCAB - 1}"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=f"w{PAD}", eos_token=f"w{ENDS[0]}")


def make_prompts(count: int, longest: int) -> list[Prompt]:
    rng = random.Random(0)
    return [
        Prompt(tuple(rng.randrange(len(ENDS) + 1, VOCAB) for _ in range(rng.randint(8, longest))), row)
        for row in range(count)
    ]


@torch.no_grad()
def generate_in_batches(
    model: Any, prompts: list[Prompt], size: int, settings: GenerationConfig
) -> list[tuple[int, ...]]:
    """What ``model.generate`` writes up to the end of every row, ``size`` rows at a time."""
    written: list[tuple[int, ...]] = []
    for start in range(0, len(prompts), size):
        rows = [prompt.token_ids for prompt in prompts[start : start + size]]
        width = max(map(len, rows))
        ids = torch.tensor([[PAD] * (width - len(row)) + list(row) for row in rows], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, width:]
        ends = torch.isin(output, torch.tensor(ENDS, device=model.device)).int()
        lengths = (ends.cumsum(-1) == ends).sum(-1)  # no end before these tokens
        written += [tuple(row[:length]) for row, length in zip(output.tolist(), lengths.tolist(), strict=True)]
    return written


def vllm_alone(generator: VllmGenerator, prompts: list[Prompt], max_tokens: int) -> Callable[[int], int]:
    """vLLM's engine as its documentation calls it, with the same end tokens."""
    import vllm

    settings = vllm.SamplingParams(max_tokens=max_tokens, stop_token_ids=ENDS, detokenize=False)
    inputs = [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts]

    def write(seed: int) -> int:
        generator._llm.reset_prefix_cache()
        outputs = generator._llm.generate(inputs, settings, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return write


def measure(sides: dict[str, Callable[[int], int]], rounds: int) -> list[dict[str, Any]]:
    """The tokens per second of each side, which writes with a seed and returns the number of tokens. The first is compared."""
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for seed in range(rounds + 1):  # the first warms up
        for name, side in sides.items():
            start = time.perf_counter()
            tokens = side(seed)
            seconds = time.perf_counter() - start
            if seed:
                speeds[name].append(tokens / seconds)
                print(f"  round {seed}: {name:14} {tokens:6d} tokens in {seconds:6.2f} s", flush=True)
    middle = {name: statistics.median(values) for name, values in speeds.items()}
    first = next(iter(middle))
    return [
        {"side": name, "tokens_per_second": value, f"times_as_fast_is_{first}": middle[first] / value}
        for name, value in middle.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--longest", type=int, default=64, help="tokens of the longest prompt; the shortest has 8")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument(
        "--micro-batch", type=int, default=8, help="per_device_train_batch_size of GKDTrainer; its default"
    )
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="vLLM compiles its model, on a CPU too")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    device, rounds = torch.device(args.device), 1 if args.quick else args.rounds
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODEL, dtype=dtype).to(device).eval()
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(MODEL, dtype=dtype)
    generator = HfGenerator(outline, make_tokenizer(), device, args.slots)
    generator.update_weights(model.state_dict().items(), 0)
    prompts = make_prompts(args.prompts, args.longest)
    settings = GenerationConfig(
        max_new_tokens=args.max_tokens, do_sample=True, temperature=1.0, top_k=0, pad_token_id=PAD, eos_token_id=ENDS
    )

    def written_by(generator: Any) -> Callable[[int], int]:
        def write(seed: int) -> int:
            sampling = SamplingParams(max_tokens=args.max_tokens, seed=seed)
            return sum(len(completion.token_ids) for completion in generator.generate(prompts, sampling))

        return write

    def theirs(seed: int) -> int:
        torch.manual_seed(seed)
        return sum(map(len, generate_in_batches(model, prompts, args.micro_batch, settings)))

    greedy = SamplingParams(args.max_tokens, temperature=0)

    def equal_greedy(others: list[tuple[int, ...]]) -> int:
        """The number of prompts whose most likely completion is that of ``others``; in bf16, rounding decides ties."""
        ours = [completion.token_ids for completion in generator.generate(prompts, greedy)]
        return sum(one == other for one, other in zip(ours, others, strict=True))

    def report(results: list[dict[str, Any]]) -> None:
        if args.json:
            values = {"device": str(device), "dtype": str(dtype), "equal_greedy_completions": equal, "results": results}
            write_json(args.json, values)

    print(f"{len(prompts)} prompts of 8 to {args.longest} tokens, up to {args.max_tokens} new ones, {dtype}, {device}")
    greedy_settings = GenerationConfig(
        **{**settings.to_diff_dict(), "do_sample": False, "temperature": None, "top_k": None}
    )
    equal = {"model.generate": equal_greedy(generate_in_batches(model, prompts, args.micro_batch, greedy_settings))}
    results = measure({"limbeck": written_by(generator), "model.generate": theirs}, rounds)
    report(results)  # starting vLLM may take longer than a caller waits
    if find_spec("vllm"):
        changes = {"enforce_eager": False} if args.compile else {}
        engine = VllmGenerator(
            outline, make_tokenizer(), args.longest + args.max_tokens, device.type, arguments=changes
        )
        engine.update_weights(model.state_dict().items(), 0)
        equal["vllm"] = equal_greedy([completion.token_ids for completion in engine.generate(prompts, greedy)])
        alone = vllm_alone(engine, prompts, args.max_tokens)
        results += measure({"limbeck": written_by(generator), "vllm": written_by(engine), "vllm alone": alone}, rounds)
        report(results)
    for side, number in equal.items():
        print(f"  greedy completions equal to those of {side}: {number} of {len(prompts)}")
    for result in results:
        times = result["times_as_fast_is_limbeck"]
        print(f"  {result['side']:14} {result['tokens_per_second']:8.0f} tokens/s; limbeck is {times:.2f} × as fast")


if __name__ == "__main__":
    main()
