"""Small tokenizers, trained on the spot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import make_corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from limbeck.data.sources import BadRow, Line, Record, RowError, Source, decoded, inputs_of

CORPUS = [
    "What is two and three? Two and three is five.",
    "How many eggs does Ann have? She has 12 eggs, and 3 more make 15.",
    "Das süße Mädchen fragt: wie viel ist 7 mal 8? Es sind 56.",
]
SPECIAL = ["<s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NATIVE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def build(
    *,
    bos: bool = False,
    trim_offsets: bool = False,
    metaspace: bool = False,
    vocab_size: int = 400,
    special: list[str] | None = None,
    **options: Any,
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(byte_fallback=False))
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        backend.decoder = decoders.Metaspace(prepend_scheme="always")
        alphabet = [chr(c) for c in range(32, 127)]
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = special or SPECIAL
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    steps: list[Any] = [] if metaspace else [processors.ByteLevel(trim_offsets=trim_offsets)]
    if bos:
        steps.append(processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", special.index("<s>"))]))
        options = {"bos_token": "<s>", **options}
    backend.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(
        **{
            "tokenizer_object": backend,
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
            **options,
        }
    )


@pytest.fixture(scope="session")
def read_records() -> Callable[[str | Path], Iterator[Record]]:
    """The rows that a name stands for; the first bad one raises."""

    def read(name: str | Path) -> Iterator[Record]:
        for one in inputs_of(Source.named(name)):
            for item in one.read():
                if isinstance(item, BadRow):
                    raise RowError(item.kind, item.reason)
                assert isinstance(item, (Line, Record))
                yield decoded(item)

    return read


@pytest.fixture(scope="session")
def build_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return build


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, no BOS, no chat template, pad is EOS."""
    return build()


@pytest.fixture(scope="session")
def native_tokenizer() -> PreTrainedTokenizerFast:
    """Puts BOS, and has a chat template that writes BOS itself."""
    return build(bos=True, chat_template=NATIVE)


@pytest.fixture(scope="session")
def write_corpus() -> Callable[..., None]:
    return make_corpus
