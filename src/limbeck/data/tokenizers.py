"""May a student learn from this teacher position by position? Only if both mean the same token by the same id."""

from __future__ import annotations

from typing import TYPE_CHECKING

from limbeck.errors import LimbeckError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise LimbeckError unless both tokenizers map the same ids to the same tokens, special ones included.

    Names, files and padding do not matter. Nor does which token is EOS: a base model and its chat sibling disagree on
    that and still share every id. A token added behind the vocabulary of one side alone does not change how ordinary text
    is cut, so it passes; data that holds it is refused later, by its id.
    """
    ours, theirs = _by_id(student), _by_id(teacher)
    added = student.added_tokens_decoder.keys() ^ teacher.added_tokens_decoder.keys()
    one_sided = added & (ours.keys() ^ theirs.keys())
    differing = sorted(i for i in (ours.keys() | theirs.keys()) - one_sided if ours.get(i) != theirs.get(i))
    if not differing:
        return
    examples = "; ".join(
        f"{i} is {_name(ours, i)} for the student, {_name(theirs, i)} for the teacher" for i in differing[:3]
    )
    raise LimbeckError(
        f"The tokenizers of student ({student.name_or_path}) and teacher ({teacher.name_or_path}) differ in "
        f"{len(differing)} of {len(ours.keys() | theirs.keys())} ids ({examples}); "
        "choose a teacher that shares the student's tokenizer, or set cross_tokenizer: hybrid to compare their words by the "
        "text that they stand for."
    )


def _by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}


def _name(tokens: dict[int, str], index: int) -> str:
    return repr(tokens[index]) if index in tokens else "unused"
