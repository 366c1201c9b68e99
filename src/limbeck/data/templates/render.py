"""Renders a conversation with a template, with every answer in the context in which it would be generated.

A supervised answer begins where the template's generation prompt ends. Many templates change an answer once other turns
follow (Qwen3 removes its thinking), so a single text cannot contain every answer as generated. Such a conversation becomes
several texts, each as the model reads and writes it at inference.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from limbeck.data.rows import Conversation, Message
from limbeck.data.templates.resolve import Template
from limbeck.errors import LimbeckError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RESERVED = (
    "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "messages", "tools",
    "documents",
)  # fmt: skip
_MARK = "\ue000the answer\ue001"  # private-use characters, which texts do not contain and templates do not change
_REASONING = ("reasoning_content", "thinking", "reasoning")

Write = Callable[[Sequence[Message], bool], str]
"""(messages, add_generation_prompt) -> text."""


@dataclass(frozen=True)
class Rendered:
    """One text to train on.

    spans:  ``(start, end, weight)`` of each answer including its end token, in characters and in order. Weight 0: not
            supervised.
    weight: weight of all other characters, if prompts are supervised too.
    is_prompt: the text of a prompt, after which the student writes.
    """

    text: str
    spans: tuple[tuple[int, int, float], ...]
    weight: float = 1.0
    is_prompt: bool = False


def render(
    conversation: Conversation,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any],
    where: str,
) -> tuple[Rendered, ...]:
    """Returns the texts of a conversation, in order: one, unless the template changes a supervised answer in later turns.

    Each answer is supervised in exactly one text; other texts may contain it as context. If the template does not end the last
    answer of a text, EOS is appended, so that the student learns to stop. A prompt, or a conversation without an answer, is
    rendered as a prompt. ``where`` names the row in errors.

    Raises LimbeckError if the template fails, ignores tools or reasoning of the row, or does not show where an answer begins.
    """
    if conversation.plain:
        return (_running_text(conversation, template, tokenizer),)
    messages = [_readable(message) for message in conversation.messages]
    weights = _answer_weights(messages, conversation.weight, template.last_only)
    messages, added = _with_surroundings(messages, template)
    answers = [(turn + added, weight) for turn, weight in weights if not conversation.is_prompt]
    jinja = template.with_tools if conversation.tools and template.with_tools else template.jinja
    _check_room(conversation, messages, [turn for turn, weight in answers if weight], template.name, jinja, where)
    write = _writer(
        jinja, template.name, conversation.tools, {**tokenizer.special_tokens_map, **template_kwargs}, where
    )

    if not answers:
        return (Rendered(write(messages, True), (), conversation.weight, conversation.is_prompt),)
    texts: list[tuple[str, list[tuple[int, int, float]]]] = []
    if messages[-1]["role"] != "assistant":
        texts.append((write(messages, False).rstrip(), []))
    # From the last answer to the first: an answer joins a text that begins as it was generated, or starts a new text.
    for turn, weight in reversed(answers):
        if weight:
            start, text = _answer(write, messages, turn, template.name, where)
        elif (found := _as_written(write, messages, turn)) is not None:
            start, text = found
        else:
            continue  # unsupervised and changed later: only context
        home = next((spans for known, spans in texts if known.startswith(text)), None)
        if home is None:
            home = []
            ended = _ended(text, template, tokenizer)
            texts.append((ended, home))
            text = ended
        home.append((start, len(text), weight))
    # A row without supervised answers is still one text: it is counted, and its prompt may be supervised.
    whole = [(write(messages, False).rstrip(), [])] if not texts else texts[:1]
    learned = [(text, spans) for text, spans in texts if any(weight for _, _, weight in spans)] or whole
    return tuple(Rendered(text, tuple(reversed(spans)), conversation.weight) for text, spans in reversed(learned))


def check_template_kwargs(template_kwargs: Mapping[str, Any], template: Template) -> None:
    """Raises LimbeckError for a reserved key, a key that the template does not use, and a template that is not valid Jinja."""
    from jinja2 import TemplateError, meta
    from transformers.utils.chat_template_utils import _compile_jinja_template

    read: set[str] = set()
    for jinja in (template.jinja, template.with_tools):
        if jinja is not None:
            try:
                environment = _compile_jinja_template(jinja).environment
                read |= meta.find_undeclared_variables(environment.parse(jinja))
            except TemplateError as error:
                raise LimbeckError(
                    f"the chat template ({template.name}) is not valid Jinja: {error}; correct it."
                ) from error
    for key in template_kwargs:
        if key in _RESERVED:
            raise LimbeckError(f"template_kwargs.{key} is set by the renderer itself; remove it.")
        if key not in read:
            near = difflib.get_close_matches(str(key), read, n=1)
            advice = f"did you mean {near[0]}?" if near else "remove it, or choose a template that reads it."
            raise LimbeckError(
                f"template_kwargs.{key} is not read by the chat template ({template.name}), so it would change nothing; "
                + advice
            )


def _running_text(conversation: Conversation, template: Template, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    text = conversation.messages[0]["content"]
    if tokenizer.eos_token is None:
        raise LimbeckError(
            f"The tokenizer {tokenizer.name_or_path} has no eos_token, so the student could not learn to stop; set it."
        )
    text = template.bos + text.removeprefix(template.bos).removesuffix(tokenizer.eos_token) + tokenizer.eos_token
    return Rendered(text, ((0, len(text), conversation.weight),), conversation.weight)


def _readable(message: Message) -> Message:
    """Returns a message without nulls, with its reasoning under every name that templates use."""
    message = {key: _plain(value) for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """Converts a value to JSON types, so that a template cannot call methods of other objects."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str.__str__(value) if isinstance(value, str) else str(value)


def _answer_weights(messages: Sequence[Message], row_weight: float, last_only: bool) -> list[tuple[int, float]]:
    """Returns (turn, weight) of the answers: the row's weight times the turn's."""
    weights = [
        (turn, row_weight * message.get("weight", 1.0))
        for turn, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    return [one for one in weights if not last_only or one == weights[-1] or not one[1]]


def _with_surroundings(messages: Sequence[Message], template: Template) -> tuple[list[Message], int]:
    """Adds the default system message and the text around the first question; also returns the number of added messages."""
    before, after = template.question
    result = list(messages)
    first = next((turn for turn, message in enumerate(messages) if message["role"] == "user"), None)
    if first is not None and (before or after):
        result[first] = {**result[first], "content": before + result[first]["content"] + after}
    if template.system is None or (result and result[0]["role"] in ("system", "developer")):
        return result, 0
    return [{"role": "system", "content": template.system}, *result], 1


def _check_room(
    conversation: Conversation, messages: Sequence[Message], learned: Sequence[int], name: str, jinja: str, where: str
) -> None:
    """Raises LimbeckError if the row has tools, tool calls or reasoning that the template does not render."""
    missing = None
    if conversation.tools and "tools" not in jinja:
        missing = "tools"
    elif "tool_calls" not in jinja and any(message.get("tool_calls") for message in messages):
        missing = "tool_calls"
    elif any(messages[turn].get("reasoning_content") for turn in learned) and not re.search(
        r"reasoning|\.thinking|\[.thinking", jinja
    ):
        missing = "reasoning_content"
    if missing:
        raise LimbeckError(
            f"{where} has {missing}, which the chat template ({name}) does not render; "
            "choose a template that does (template: native, or qwen3), or write it into the contents."
        )


def _writer(
    jinja: str, name: str, tools: list[dict[str, Any]] | None, variables: Mapping[str, Any], where: str
) -> Write:
    # The sandbox of apply_chat_template, without its overhead on each call; a test compares the two.
    from transformers.utils.chat_template_utils import _compile_jinja_template

    def write(messages: Sequence[Message], prompt: bool) -> str:
        try:
            return _compile_jinja_template(jinja).render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **variables
            )
        except Exception as error:  # a template is a program and may raise anything
            raise LimbeckError(f"{where}: the chat template ({name}) cannot render this row: {error}") from error

    return write


def _as_written(write: Write, messages: Sequence[Message], turn: int) -> tuple[int, str] | None:
    """Returns the start of the answer of ``turn`` and the text up to its end, or None without a matching prompt."""
    prompt = write(messages[:turn], True)
    text = write(messages[: turn + 1], False).rstrip()
    if not text.startswith(prompt) or len(text) == len(prompt):
        return None
    content = messages[turn].get("content") or ""
    if "</think>" in content and _squeezed(content) not in _squeezed(text[len(prompt) :]):
        return None  # the template removes thinking even from the last answer
    return len(prompt), text


def _answer(write: Write, messages: Sequence[Message], turn: int, name: str, where: str) -> tuple[int, str]:
    """Like ``_as_written`` for a supervised answer; raises LimbeckError if its start cannot be found.

    If the prompt itself opens the answer (``<think>``), the answer is the rest: its content, without the opening if it
    repeats it, and what the template adds after a content.
    """
    found = _as_written(write, messages, turn)
    if found is not None:
        return found
    prompt = write(messages[:turn], True)
    content = messages[turn].get("content") or ""
    before, mark, after = write([*messages[:turn], {**messages[turn], "content": _MARK}], False).partition(_MARK)
    opening = prompt[len(before) :].strip()
    closed = re.search(r"</(\w+)>$", prompt.rstrip())
    if not mark or not prompt.startswith(before) or (closed and closed[0] in content):
        raise LimbeckError(
            f"{where}: the chat template ({name}) renders turn {turn} (the assistant's) differently in a prompt and after "
            "it, so the start of the answer is unknown; set template: chatml, or make the two agree (an answer with "
            "thinking, for example, after a prompt that disables it)."
        )
    tag = re.search(r"<(\w+)>$", opening)
    if tag and f"</{tag[1]}>" not in content:
        raise LimbeckError(
            f"{where}: the chat template ({name}) opens {tag[0]} for turn {turn} (the assistant's), which its content "
            f"never closes; give it a </{tag[1]}>, or choose a template that opens nothing."
        )
    if opening and content.lstrip().startswith(opening):
        content = content.lstrip().removeprefix(opening).lstrip("\n")
    return len(prompt), (prompt + content + after).rstrip()


def _ended(text: str, template: Template, tokenizer: PreTrainedTokenizerBase) -> str:
    if text.endswith(template.ends):
        return text
    if tokenizer.eos_token is None:
        raise LimbeckError(
            f"The tokenizer {tokenizer.name_or_path} has no eos_token and the chat template ({template.name}) "
            "ends no answer, so the student could not learn to stop; set the tokenizer's eos_token."
        )
    return text + tokenizer.eos_token


def _squeezed(text: str) -> str:
    return "".join(text.split())
