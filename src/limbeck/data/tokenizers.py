"""Tokenizers that no checkpoint has, and the check that student and teacher have the same tokenizer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from limbeck.errors import LimbeckError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

NUMBERS = "null:"
"""Begins the name of a tokenizer of numbers: null:1000 has the tokens 0 to 999."""

GPT2 = "gpt2:"
"""Begins the name of a tokenizer of two files, as GPT-2's: gpt2:vocab.json,merges.txt."""

_CUTS = {
    "normalizer": ("normalizer",),
    "pre-tokenizer": ("pre_tokenizer",),
    "merges": ("model", "merges"),
    "kind of model": ("model", "type"),
    "unknown token": ("model", "unk_token"),
    "byte fallback": ("model", "byte_fallback"),
    "treatment of whole words": ("model", "ignore_merges"),
}
"""The parts of a tokenizer.json that, beside the vocabulary, determine how text is split into tokens."""


def number_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer ``null:N`` of the numbers 0 to N - 1, for token ids without text. The last one is the end token.

    Raises LimbeckError if N is not a number of tokens.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    size = name.removeprefix(NUMBERS)
    if not size.isdecimal() or not 2 <= int(size) <= 1 << 24:
        raise LimbeckError(
            f"tokenizer = {name} must end in the size of the vocabulary, from 2 on, such as {NUMBERS}32000."
        )
    last = str(int(size) - 1)
    backend = Tokenizer(models.WordLevel({str(number): number for number in range(int(size))}, unk_token=last))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=last, pad_token=last)


def gpt2_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer ``gpt2:VOCAB,MERGES`` of a file with tokens and one with merges. Its end token is
    ``<|endoftext|>``.

    Raises LimbeckError if the files are not such files.
    """
    from tokenizers.models import BPE
    from transformers import GPT2Tokenizer

    vocab, _, merges = name.removeprefix(GPT2).rpartition(",")
    try:
        tokens, pairs = BPE.read_file(vocab, merges)
    except Exception as error:
        raise LimbeckError(
            f"tokenizer = {name} must name a vocab.json and a merges.txt of GPT-2, which cannot be read: {error}."
        ) from error
    tokenizer: PreTrainedTokenizerFast = GPT2Tokenizer(vocab=tokens, merges=pairs)
    if tokenizer.eos_token not in tokens:
        raise LimbeckError(f"{vocab} has no token {tokenizer.eos_token}, which ends a document of GPT-2; add it.")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raises LimbeckError unless both tokenizers have the same tokens under the same ids and split text in the same way.

    Names, files and padding do not matter, nor does which token is EOS: a base model and its chat model differ in it and
    share every id. A token that only one side has after its vocabulary is allowed, because it does not change how ordinary
    text is split. Data that contains it is refused later, by its id.
    """
    ours, theirs = _by_id(student), _by_id(teacher)
    added = student.added_tokens_decoder.keys() ^ teacher.added_tokens_decoder.keys()
    one_sided = added & (ours.keys() ^ theirs.keys())
    differing = sorted(i for i in (ours.keys() | theirs.keys()) - one_sided if ours.get(i) != theirs.get(i))
    names = f"The tokenizers of student ({student.name_or_path}) and teacher ({teacher.name_or_path})"
    if differing:
        examples = "; ".join(
            f"{i} is {_name(ours, i)} for the student, {_name(theirs, i)} for the teacher" for i in differing[:3]
        )
        raise LimbeckError(
            f"{names} differ in {len(differing)} of {len(ours.keys() | theirs.keys())} ids ({examples}); "
            "choose a teacher with the student's tokenizer, or set cross_tokenizer: hybrid to compare tokens by their text."
        )
    others = _other_cuts(student, teacher)
    if others:
        raise LimbeckError(
            f"{names} have the same ids, but split text differently (their {' and '.join(others)} differ); "
            "choose a teacher with the student's tokenizer, or set cross_tokenizer: hybrid to compare tokens by their text."
        )


def _other_cuts(student: Any, teacher: Any) -> list[str]:
    """Returns the parts in ``_CUTS`` that differ; empty if one tokenizer is slow and has no tokenizer.json."""
    if not (student.is_fast and teacher.is_fast):
        return []
    ours, theirs = (json.loads(one.backend_tokenizer.to_str()) for one in (student, teacher))
    return [name for name, path in _CUTS.items() if _at(ours, path) != _at(theirs, path)]


def _at(content: dict[str, Any], path: tuple[str, ...]) -> Any:
    found: Any = content
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    # A missing key, null, false and an empty value mean the same.
    if path[-1] == "merges":
        return [merge.split(" ") if isinstance(merge, str) else merge for merge in found or []]
    return found or None


def _by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}


def _name(tokens: dict[int, str], index: int) -> str:
    return repr(tokens[index]) if index in tokens else "unused"
