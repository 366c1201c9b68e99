"""Converts a row of any format in ``FORMATS`` to a conversation: a list of ``{"role", "content"}`` messages."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from limbeck.data.sources import Record, RowError
from limbeck.data.sources.columns import NEMO_RL_KEYS
from limbeck.errors import LimbeckError

Message = dict[str, Any]
"""``role`` and ``content`` are strings; other keys (``reasoning_content``, …) are passed to the template."""

_ROLES = ("system", "developer", "user", "assistant", "tool")
_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_QUESTION_NAMES = ("question", "problem", "prompt", "instruction", "query", "input")
_ANSWER_NAMES = ("answer", "solution", "response", "output", "completion", "target")
_WITHOUT_ANSWERS = (
    "let the student write all answers (rollout.on_policy_fraction: 1), or the teacher the others "
    "(rollout.off_policy: teacher); validation rows may lack an answer with validation.rollout"
)


@dataclass(frozen=True)
class RowKeys:
    """The keys of a row.

    question, answer, prompt, system: of a question-and-answer row. weight, domain: of a row of any format.
    """

    question: str
    answer: str
    prompt: str | None = None
    system: str | None = None
    weight: str | None = "weight"
    domain: str | None = None


@dataclass(frozen=True)
class Conversation:
    """One row before rendering.

    messages: the turns, in order; an assistant turn's ``weight`` multiplies the loss of its tokens (0: not supervised).
    tools:    tool definitions for the template.
    weight:   factor of the loss of every supervised token of the row.
    plain:    plain text in one message: rendered without a template, and every token is supervised.
    is_prompt: a prompt: the template's generation prompt follows, and nothing is supervised.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    weight: float = 1.0
    plain: bool = False
    is_prompt: bool = False


ToConversation = Callable[[Record], Conversation]


@dataclass(frozen=True)
class Format:
    """A row format.

    shown:   its name in reports.
    marks:   the keys by which it is detected.
    read:    returns the messages of a row.
    columns: whether ``prompt_key`` and ``system_key`` apply; other formats contain their own system message.
    plain:   whether rows are plain text.
    """

    shown: str
    marks: tuple[str, ...]
    read: Callable[[Record, RowKeys], list[Message]]
    columns: bool = False
    plain: bool = False


def detect(first: Record, keys: RowKeys, prompts: bool = False) -> str:
    """Detects the format of a source from its first row and returns its name in ``FORMATS``.

    Raises LimbeckError for a prompt without an answer, unless ``prompts`` is set.
    """
    there = {*first.row, *(_answer_keys(keys).values() if prompts else ())}
    if keys.question in there and keys.answer in there:
        return "question_answer"
    for name, form in FORMATS.items():
        if form.marks and all(mark in there for mark in form.marks):
            return name
    if not prompts and "prompt" in first.row and not any(name in first.row for name in _ANSWER_NAMES):
        raise LimbeckError(
            f"{first.where} is a prompt without an answer (it has {listed(first.row)}); give rows with answers, or "
            f"{_WITHOUT_ANSWERS}."
        )
    return "question_answer"


def reader(name: str, keys: RowKeys, prompts: bool = False, prompts_only: bool = False) -> ToConversation:
    """Returns the function that reads rows of the format ``name``; with ``prompts``, up to the last answer.

    The function raises RowError, with the row's location, for a row with missing keys, non-text values, or no answer. With
    ``prompts_only``, a row without an answer is read as a prompt.
    """
    if prompts_only and not prompts:
        return _reader_of_both(name, keys)
    form = FORMATS[name]
    answer = _answer_keys(keys).get(name) if prompts else None

    def read(record: Record) -> Conversation:
        if answer is not None:  # its value is not used
            record = record._replace(row={**record.row, answer: "…"})
        messages = form.read(record, keys)
        weight = (
            1.0 if keys.weight is None else _weight(record.row.get(keys.weight), f'{record.where}: "{keys.weight}"')
        )
        if prompts:
            return Conversation(
                _asked(record, messages if form.columns else _with_system(record, messages), form),
                _tools(record),
                weight,
                is_prompt=True,
            )
        if form.plain:
            return Conversation(messages, weight=weight, plain=True)
        if not form.columns:
            messages = _with_system(record, messages)
        return Conversation(_with_answers(record, messages), _tools(record), weight)

    return read


def _reader_of_both(name: str, keys: RowKeys) -> ToConversation:
    """Reads rows with answers, and prompts."""
    form, column = FORMATS[name], _answer_keys(keys).get(name)
    read_answered, read_prompt = reader(name, keys), reader(name, keys, prompts=True)

    def has_answer(record: Record) -> bool:
        if column is not None:
            value = record.row.get(column)
            return bool(value.strip() if isinstance(value, str) else value)
        messages = form.read(record, keys)
        return bool(messages) and messages[-1]["role"] == "assistant"

    def read(record: Record) -> Conversation:
        if has_answer(record):
            return read_answered(record)
        prompt = read_prompt(record)
        if prompt.weight != 1:
            raise RowError(
                "weight without an answer",
                f'{record.where} has no answer, and its "{keys.weight}" would weight one; remove it.',
            )
        return prompt

    return read


def _answer_keys(keys: RowKeys) -> dict[str, str]:
    """Format -> the column of the answer, for formats that have one."""
    return {"question_answer": keys.answer, "prompt_completion": "completion", "instruction": "output"}


def _asked(record: Record, messages: list[Message], form: Format) -> list[Message]:
    """Returns the turns before a final answer."""
    turns = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    if form.plain or not any(message["role"] == "user" for message in turns):
        raise RowError("no question", f"{record.where} has no user turn, which a prompt needs.")
    return turns


def shown_format(name: str, keys: RowKeys) -> str:
    """Returns the name of a format in reports."""
    return FORMATS[name].shown.format(question=keys.question, answer=keys.answer)


def check_columns(name: str, keys: RowKeys, source: str) -> None:
    """Raises LimbeckError for a configured column that does not apply to this format."""
    if FORMATS[name].columns:
        return
    for setting, key in (("prompt_key", keys.prompt), ("system_key", keys.system)):
        if key is not None:
            raise LimbeckError(
                f'{source} has rows of the format "{FORMATS[name].shown}", to which {setting}: {key} does not apply; '
                "put that text into the conversation's turns, or remove the setting."
            )


def _question_answer(record: Record, keys: RowKeys) -> list[Message]:
    question = _text(record, keys.question, "question_key")
    answer = _answer(record, keys.answer, _text(record, keys.answer, "answer_key"))
    prompt = _optional_text(record, keys.prompt, "prompt_key")
    system = _optional_text(record, keys.system, "system_key")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": f"{prompt}\n{question}" if prompt else question})
    messages.append({"role": "assistant", "content": answer})
    return messages


def _messages(record: Record, keys: RowKeys) -> list[Message]:
    return turns_of(record, "messages")


def _conversations(record: Record, keys: RowKeys) -> list[Message]:
    return turns_of(record, "conversations")


def _prompt_completion(record: Record, keys: RowKeys) -> list[Message]:
    messages = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = _given(record, key)
        if isinstance(value, (list, dict)):
            messages += turns_of(record, key)
        else:
            messages.append({"role": role, "content": checked_text(value, f'{record.where}: "{key}"')})
    return messages


def _instruction(record: Record, keys: RowKeys) -> list[Message]:
    messages = []
    history = record.row.get("history") or []
    if not isinstance(history, list):
        raise RowError("wrong type", f'{record.where}: "history" must be a list of pairs of a question and its answer.')
    for turn, pair in enumerate(history):
        where = f'{record.where}: "history"[{turn}]'
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowError("wrong type", f"{where} must be a pair of a question and its answer.")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": checked_text(text, where)})
    instruction = checked_text(_given(record, "instruction"), f'{record.where}: "instruction"')
    more = record.row.get("input")
    more = "" if more is None else checked_text(more, f'{record.where}: "input"')
    answer = _answer(record, "output", checked_text(_given(record, "output"), f'{record.where}: "output"'))
    question = "\n".join(part for part in (instruction, more) if part)
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _running_text(record: Record, keys: RowKeys) -> list[Message]:
    text = _answer(record, "text", checked_text(_given(record, "text"), f'{record.where}: "text"'))
    return [{"role": "assistant", "content": text}]


FORMATS: dict[str, Format] = {
    "question_answer": Format("{question}/{answer}", (), _question_answer, columns=True),
    "messages": Format("messages", ("messages",), _messages),
    "conversations": Format("conversations", ("conversations",), _conversations),
    "prompt_completion": Format("prompt/completion", ("prompt", "completion"), _prompt_completion),
    "instruction": Format("instruction/input/output", ("instruction", "output"), _instruction),
    "text": Format("text", ("text",), _running_text, plain=True),
}
"""Name -> format, in the order in which they are detected."""


def turns_of(record: Record, key: str) -> list[Message]:
    """Returns the messages of a list of turns, each ``{"role", "content"}`` or ``{"from", "value"}``."""
    turns = _given(record, key)
    if isinstance(turns, str):  # a column of a table that holds JSON
        turns = _parsed(turns)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError("wrong type", f'{record.where}: "{key}" must be a list of objects.')
    return [_message(turn, f"{record.where}: {key}[{number}]") for number, turn in enumerate(turns)]


def _message(item: dict[str, Any], where: str) -> Message:
    # Tables store missing keys as nulls.
    item = {name: value for name, value in item.items() if value is not None}
    share = "from" in item and "role" not in item
    speaker = _member(item, "from" if share or ("role" not in item and "value" in item) else "role", where)
    known = _SPEAKERS if share else dict.fromkeys(_ROLES, "")
    if speaker not in known:
        verb = "is from" if share else "has the role"
        raise RowError("unknown role", f'{where} {verb} "{speaker}"; use one of {", ".join(known)}.')
    message = {name: value for name, value in item.items() if name not in ("from", "value", "train", "weight")}
    message["role"] = _SPEAKERS[speaker] if share else speaker
    text = item.get("value" if share else "content")
    calls = item.get("tool_calls")
    if share and speaker == "function_call":
        calls = _calls(text, where)
        text = None
    if calls:
        message["tool_calls"] = _checked_calls(calls, where)
    else:
        message.pop("tool_calls", None)
    if text is None and (calls or message["role"] == "tool"):
        message["content"] = ""
    else:
        key = "value" if share else "content"
        message["content"] = checked_text(_joined(_present(item, key, where)), f'{where}: "{key}"')
    train = item.get("train", True)
    if not isinstance(train, bool):
        raise RowError("wrong type", f'{where}: "train" must be true or false.')
    weight = _weight(item.get("weight"), f'{where}: "weight"') if train else 0.0
    if weight != 1.0:
        message["weight"] = weight
    return message


def _joined(content: Any) -> Any:
    """Joins a content given in parts, if all of them are text."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    return "".join(cast(list[str], texts)) if texts and all(isinstance(text, str) for text in texts) else content


def _calls(text: Any, where: str) -> list[Any]:
    """Parses ShareGPT tool calls, which are JSON in the turn's text: one object or a list."""
    found = _parsed(checked_text(text, f'{where}: "value"'))
    found = found if isinstance(found, list) else [found]
    if not found or not all(isinstance(call, dict) and "name" in call for call in found):
        raise RowError("bad tool call", f'{where} is a function_call; write it as JSON with "name" and "arguments".')
    return [{"type": "function", "function": call} for call in found]


def _checked_calls(calls: Any, where: str) -> list[Any]:
    """Returns tool calls with their arguments as objects, which chat templates expect."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError("bad tool call", f'{where}: "tool_calls" must be a list of objects.')
    checked = []
    for call in calls:
        inner = call.get("function")
        if isinstance(inner, dict) and isinstance(inner.get("arguments"), str):
            arguments = _parsed(inner["arguments"])
            if isinstance(arguments, dict):
                call = {**call, "function": {**inner, "arguments": arguments}}
        checked.append(call)
    return checked


def _parsed(text: str) -> Any:
    """Parses JSON; None if it is invalid."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _tools(record: Record) -> list[dict[str, Any]] | None:
    tools = record.row.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = _parsed(tools)
        if tools is None:
            raise RowError("wrong type", f'{record.where}: "tools" is not valid JSON.')
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("wrong type", f'{record.where}: "tools" must be a list of objects.')
    return tools


def _with_system(record: Record, messages: list[Message]) -> list[Message]:
    """Prepends the row's ``system`` field, unless the conversation already begins with it."""
    system = record.row.get("system")
    system = "" if system is None else checked_text(system, f'{record.where}: "system"')
    if not system or (messages and messages[0]["role"] == "system" and messages[0]["content"] == system):
        return messages
    return [{"role": "system", "content": system}, *messages]


def _with_answers(record: Record, messages: list[Message]) -> list[Message]:
    answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise RowError(
            "no assistant turn",
            f"{record.where}: the conversation has no assistant turn, so nothing would be supervised.",
        )
    if answers[0] == 0:
        raise RowError(
            "begins with the assistant",
            f"{record.where}: the conversation begins with the assistant; begin with a user or system turn.",
        )
    for turn in answers:
        message = messages[turn]
        if not message["content"].strip() and not message.get("tool_calls") and not message.get("reasoning_content"):
            raise RowError(
                "empty answer", f"{record.where}: assistant turn {turn} is empty; give it a text, or remove the row."
            )
    return messages


def _weight(value: Any, what: str) -> float:
    """Returns a loss weight; 1 if missing."""
    if value is None or value == "":  # an empty cell of a CSV table
        return 1.0
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 0 <= weight < 1e30:
        raise RowError("wrong weight", f"{what} must be a number from 0, but is {str(value)[:40]!r}.")
    return weight


def _given(record: Record, key: str) -> Any:
    if key not in record.row:
        raise RowError(
            "missing key",
            f'{record.where} has no "{key}" (it has {listed(record.row)}) although the source\'s first row does; '
            "keep one format per file.",
        )
    return record.row[key]


def _present(item: dict[str, Any], key: str, where: str) -> Any:
    if key not in item:
        raise RowError("missing key", f'{where} has no "{key}" (it has {listed(item)}).')
    return item[key]


def _member(item: dict[str, Any], key: str, where: str) -> str:
    return checked_text(_present(item, key, where), f'{where}: "{key}"')


def _answer(record: Record, key: str, answer: str) -> str:
    if not answer.strip():
        raise RowError(
            "empty answer", f'{record.where}: "{key}" is empty; give every row an answer, or remove the row.'
        )
    return answer


def _text(record: Record, key: str, setting: str) -> str:
    if key not in record.row:
        usual = _QUESTION_NAMES if setting == "question_key" else _ANSWER_NAMES
        guess = next((name for name in usual if name in record.row), None)
        advice = f"{setting}: {guess}" if guess else f"{setting} to the column that holds it"
        advice += f" ({NEMO_RL_KEYS[setting]} in the form of NeMo-RL)"
        if setting == "answer_key" and guess is None:
            advice += f", or {_WITHOUT_ANSWERS}"
        raise RowError("missing key", f'{record.where} has no "{key}" (it has {listed(record.row)}); set {advice}.')
    return checked_text(record.row[key], f'{record.where}: "{key}"')


def _optional_text(record: Record, key: str | None, setting: str) -> str:
    """Returns the text of an optional column, which may be empty or null but must exist."""
    if key is None:
        return ""
    if key not in record.row:
        raise RowError(
            "missing key",
            f'{record.where} has no "{key}" (it has {listed(record.row)}); correct {setting}, or remove that setting.',
        )
    value = record.row[key]
    return "" if value is None else checked_text(value, f'{record.where}: "{key}"')


def checked_text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise RowError("wrong type", f"{what} must be a string, but is a {type(value).__name__}.")
    if "\0" in value:
        raise RowError("NUL character", f"{what} contains a NUL character; the file may be damaged.")
    if not value.isascii():
        check_characters(value, what)
    return value


def check_characters(text: str, what: str) -> None:
    """Raises RowError for an unpaired surrogate, which JSON allows and tokenizers do not."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            "half a surrogate pair",
            f"{what} holds half of a surrogate pair (\\u{ord(text[error.start]):04x} at character {error.start}), "
            "which is not a character; remove it.",
        ) from error


def listed(names: Sequence[str] | Mapping[Any, Any]) -> str:
    shown = ", ".join(str(name)[:40] for name in list(names)[:20]).encode("utf-8", "replace").decode("utf-8")
    return shown + (", …" if len(names) > 20 else "") or "no keys"
