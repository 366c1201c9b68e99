"""Writing a conversation with a template, every answer in the context in which it would have been generated.

An answer to learn begins where the template's own generation prompt ends. Many templates show an answer otherwise once it
is history (Qwen3 drops its thinking), and no single text then holds every answer in its place: such a conversation becomes
several texts, each of which is what the model reads and writes at inference. Tokens are not known here.
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
_MARK = "\ue000the answer\ue001"  # private characters, which no text holds and no template changes
_REASONING = ("reasoning_content", "thinking", "reasoning")

Write = Callable[[Sequence[Message], bool], str]
"""(messages, whether a generation prompt follows) -> text."""


@dataclass(frozen=True)
class Rendered:
    """One text to train on.

    spans: the ``[start, end)`` characters of the answers, in order, each with the token that ends it, and the weight of
    their loss; weight 0 is not learned. weight: that of all other characters, where prompts are learned too.
    """

    text: str
    spans: tuple[tuple[int, int, float], ...]
    weight: float = 1.0


def render(
    conversation: Conversation,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any],
    where: str,
) -> tuple[Rendered, ...]:
    """The texts of a conversation, in order: one, unless the template rewrites an answer that is learned once others follow.

    Together they hold each answer to learn exactly once as learned; further texts show it as context at most. If nothing
    in the template ends the last answer of a text, the EOS token is appended, because a student that never saw an end
    does not stop. A conversation that asks, or has no answers, is written as a prompt. ``where`` names the row in errors.
    Raises LimbeckError if the template fails, leaves out something to learn, or gives an answer no certain place.
    """
    if conversation.plain:
        return (_running_text(conversation, template, tokenizer),)
    messages = [_readable(message) for message in conversation.messages]
    weights = _answer_weights(messages, conversation.weight, template.last_only)
    messages, added = _with_surroundings(messages, template)
    answers = [(turn + added, weight) for turn, weight in weights if not conversation.asks]
    jinja = template.with_tools if conversation.tools and template.with_tools else template.jinja
    _check_room(conversation, messages, [turn for turn, weight in answers if weight], template.name, jinja, where)
    write = _writer(
        jinja, template.name, conversation.tools, {**tokenizer.special_tokens_map, **template_kwargs}, where
    )

    if not answers:
        return (Rendered(write(messages, True), (), conversation.weight),)
    texts: list[tuple[str, list[tuple[int, int, float]]]] = []
    if messages[-1]["role"] != "assistant":
        texts.append((write(messages, False).rstrip(), []))
    # From the last answer to the first: an answer joins a text that begins exactly as it was generated, or opens its own.
    for turn, weight in reversed(answers):
        if weight:
            start, text = _answer(write, messages, turn, template.name, where)
        elif (found := _as_written(write, messages, turn)) is not None:
            start, text = found
        else:
            continue  # only context, wherever it stands
        home = next((spans for known, spans in texts if known.startswith(text)), None)
        if home is None:
            home = []
            ended = _ended(text, template, tokenizer)
            texts.append((ended, home))
            text = ended
        home.append((start, len(text), weight))
    # Where nothing is learned the row is still one text, so that it is counted, and its prompt can be learned.
    whole = [(write(messages, False).rstrip(), [])] if not texts else texts[:1]
    learned = [(text, spans) for text, spans in texts if any(weight for _, _, weight in spans)] or whole
    return tuple(Rendered(text, tuple(reversed(spans)), conversation.weight) for text, spans in reversed(learned))


def check_template_kwargs(template_kwargs: Mapping[str, Any], template: Template) -> None:
    """Raise LimbeckError for a key that would replace an argument of the rendering itself, or that the template never reads.

    Also for a template that is no Jinja.
    """
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
            f"The tokenizer {tokenizer.name_or_path} has no eos_token, so the end of a text could not be learned; set it."
        )
    text = template.bos + text.removeprefix(template.bos).removesuffix(tokenizer.eos_token) + tokenizer.eos_token
    return Rendered(text, ((0, len(text), conversation.weight),), conversation.weight)


def _readable(message: Message) -> Message:
    """A message as templates expect it: no nulls, and reasoning under every name that a template may ask for."""
    message = {key: _plain(value) for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """The value in JSON's own types: whatever else it may be, a template must not get hold of its methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str.__str__(value) if isinstance(value, str) else str(value)


def _answer_weights(messages: Sequence[Message], row_weight: float, last_only: bool) -> list[tuple[int, float]]:
    """The answers that are not mere context, each with the weight of its loss: the row's, times the turn's ``weight``."""
    weights = [
        (turn, row_weight * message.get("weight", 1.0))
        for turn, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    return [one for one in weights if not last_only or one == weights[-1] or not one[1]]


def _with_surroundings(messages: Sequence[Message], template: Template) -> tuple[list[Message], int]:
    """The messages with the default system message and the words around the first question; how many were put in front."""
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
    """Refuse a template that has no place for what the row brings: it would be left out without a word."""
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
            f"{where} has {missing}, for which the chat template ({name}) has no place; "
            "choose a template that has (template: native, or qwen3), or write it into the contents."
        )


def _writer(
    jinja: str, name: str, tools: list[dict[str, Any]] | None, variables: Mapping[str, Any], where: str
) -> Write:
    # The same sandbox, compiled once, that apply_chat_template resolves anew on each call; a test holds the two equal.
    from transformers.utils.chat_template_utils import _compile_jinja_template

    def write(messages: Sequence[Message], prompt: bool) -> str:
        try:
            return _compile_jinja_template(jinja).render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **variables
            )
        except Exception as error:  # a template is a program of somebody else's: any of its mistakes may come out
            raise LimbeckError(f"{where}: the chat template ({name}) cannot render this row: {error}") from error

    return write


def _as_written(write: Write, messages: Sequence[Message], turn: int) -> tuple[int, str] | None:
    """Where the answer of ``turn`` begins, and the text up to its end; None if the template's prompt is not its beginning."""
    prompt = write(messages[:turn], True)
    text = write(messages[: turn + 1], False).rstrip()
    if not text.startswith(prompt) or len(text) == len(prompt):
        return None
    content = messages[turn].get("content") or ""
    if "</think>" in content and _squeezed(content) not in _squeezed(text[len(prompt) :]):
        return None  # the template shows answers without their thinking, even the last one
    return len(prompt), text


def _answer(write: Write, messages: Sequence[Message], turn: int, name: str, where: str) -> tuple[int, str]:
    """The same for an answer that must have a place.

    If the prompt itself opens the answer (``<think>``), the answer is what goes on from there: its content, without
    the opening if it repeats that, and whatever the template puts behind a content.
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
            f"{where}: the chat template ({name}) writes turn {turn} (the assistant's) differently in a prompt and behind "
            "it, so the place of the answer is unknown; set template: chatml, or make the two agree (an answer with "
            "thinking, for example, behind a prompt that forbids it)."
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
