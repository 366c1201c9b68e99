"""From a row of any known shape to a conversation: a list of ``{"role", "content"}`` messages.

Three shapes are known: question and answer under two keys, OpenAI ``messages``, ShareGPT ``conversations``. How a
conversation becomes text is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from limbeck.data.sources import Record
from limbeck.errors import LimbeckError

Message = dict[str, Any]
"""``role`` and ``content`` are strings; further keys (``reasoning_content``, …) go to the template as they are."""

_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_QUESTION_NAMES = ("question", "problem", "prompt", "instruction", "query", "input")
_ANSWER_NAMES = ("answer", "solution", "response", "output", "completion", "target")


@dataclass(frozen=True)
class RowKeys:
    """Which keys of a question-and-answer row hold what; ``prompt`` and ``system`` are optional columns."""

    question: str
    answer: str
    prompt: str | None = None
    system: str | None = None


@dataclass(frozen=True)
class Conversation:
    """One row as it will be rendered.

    messages: the turns, in order; an assistant turn's ``weight`` (0: not learned) multiplies the loss of its tokens.
    tools: what the template is told of tools. weight: multiplies the loss of every supervised token of the row.
    plain: running text in one message: no template, every token is learned.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    weight: float = 1.0
    plain: bool = False


ToConversation = Callable[[Record], Conversation]


def detect_format(first: Record, keys: RowKeys) -> tuple[str, ToConversation]:
    """The name of a file's shape, judged by its first row, and the function that reads all its rows.

    The reader raises LimbeckError, with file and line, for a row that lacks its keys, holds something that is not text,
    or has no answer to learn from.
    """
    if keys.question in first.row and keys.answer in first.row:
        return f"{keys.question}/{keys.answer}", lambda record: Conversation(_question_answer(record, keys))
    for name, reader in (("messages", _openai), ("conversations", _sharegpt)):
        if name in first.row:
            _reject_column_keys(first, keys, name)
            return name, lambda record, reader=reader: Conversation(reader(record))
    return f"{keys.question}/{keys.answer}", lambda record: Conversation(_question_answer(record, keys))


def _question_answer(record: Record, keys: RowKeys) -> list[Message]:
    question = _text(record, keys.question, "question_key")
    answer = _text(record, keys.answer, "answer_key")
    if not answer.strip():
        raise LimbeckError(f'{record.where}: "{keys.answer}" is empty; give every row an answer, or remove the row.')
    prompt = _optional_text(record, keys.prompt, "prompt_key")
    system = _optional_text(record, keys.system, "system_key")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": f"{prompt}\n{question}" if prompt else question})
    messages.append({"role": "assistant", "content": answer})
    return messages


def _openai(record: Record) -> list[Message]:
    messages = []
    for turn, item in enumerate(_turns(record, "messages")):
        where = f"{record.where}: messages[{turn}]"
        role = _member(item, "role", where)
        if role not in _ROLES:
            raise LimbeckError(f'{where} has the role "{role}"; use one of {", ".join(_ROLES)}.')
        messages.append({**item, "role": role, "content": _member(item, "content", where)})
    return _with_answers(record, messages)


def _sharegpt(record: Record) -> list[Message]:
    messages = []
    for turn, item in enumerate(_turns(record, "conversations")):
        where = f"{record.where}: conversations[{turn}]"
        speaker = _member(item, "from", where)
        if speaker not in _SHAREGPT_ROLES:
            raise LimbeckError(f'{where} is from "{speaker}"; use one of {", ".join(_SHAREGPT_ROLES)}.')
        messages.append({"role": _SHAREGPT_ROLES[speaker], "content": _member(item, "value", where)})
    return _with_answers(record, messages)


def _with_answers(record: Record, messages: list[Message]) -> list[Message]:
    answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise LimbeckError(
            f"{record.where}: the conversation has no assistant turn, so there is nothing to learn from it."
        )
    if answers[0] == 0:
        raise LimbeckError(
            f"{record.where}: the conversation begins with the assistant; begin with a user or system turn."
        )
    for turn in answers:
        if not messages[turn]["content"].strip():
            raise LimbeckError(f"{record.where}: assistant turn {turn} is empty; give it a text, or remove the row.")
    return messages


def _turns(record: Record, key: str) -> list[dict[str, Any]]:
    if key not in record.row:
        raise LimbeckError(
            f'{record.where} has no "{key}" (it has {_listed(record.row)}) although the file\'s first row does; '
            "keep one shape per file."
        )
    turns = record.row[key]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise LimbeckError(f'{record.where}: "{key}" must be a list of objects.')
    return turns


def _member(item: dict[str, Any], key: str, where: str) -> str:
    if key not in item:
        raise LimbeckError(f'{where} has no "{key}" (it has {_listed(item)}).')
    return _checked_text(item[key], f'{where}: "{key}"')


def _text(record: Record, key: str, setting: str) -> str:
    if key not in record.row:
        usual = _QUESTION_NAMES if setting == "question_key" else _ANSWER_NAMES
        guess = next((name for name in usual if name in record.row), None)
        advice = f"{setting}: {guess}" if guess else f"{setting} to the column that holds it"
        raise LimbeckError(f'{record.where} has no "{key}" (it has {_listed(record.row)}); set {advice}.')
    return _checked_text(record.row[key], f'{record.where}: "{key}"')


def _optional_text(record: Record, key: str | None, setting: str) -> str:
    """The text of a column that may be empty or null in a row, but must exist once it is configured."""
    if key is None:
        return ""
    if key not in record.row:
        raise LimbeckError(
            f'{record.where} has no "{key}" (it has {_listed(record.row)}); correct {setting}, or remove that setting.'
        )
    value = record.row[key]
    return "" if value is None else _checked_text(value, f'{record.where}: "{key}"')


def _checked_text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise LimbeckError(f"{what} must be a string, but is a {type(value).__name__}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise LimbeckError(
            f"{what} holds half of a surrogate pair (\\u{ord(value[error.start]):04x} at character {error.start}), "
            "which is not a character; remove it."
        ) from error
    return value


def _reject_column_keys(record: Record, keys: RowKeys, shape: str) -> None:
    for setting, key in (("prompt_key", keys.prompt), ("system_key", keys.system)):
        if key is not None:
            raise LimbeckError(
                f'{record.where} is a conversation ("{shape}"), for which {setting}: {key} has no meaning; '
                "put that text into the conversation's turns, or remove the setting."
            )


def _listed(names: Sequence[str] | dict[str, Any]) -> str:
    return ", ".join(names) or "no keys"
