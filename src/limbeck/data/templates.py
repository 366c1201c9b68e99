"""From a conversation to text, and which characters of the text the student learns.

Every template is Jinja and is rendered by the tokenizer, in the sandbox of ``transformers``. Tokens are not known here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from limbeck.data.rows import Conversation, Message
from limbeck.errors import LimbeckError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMED = {
    "base": (
        "{% for message in messages %}"
        "{{ message['content'] + ((eos_token | default('')) if message['role'] == 'assistant' else '\\n') }}"
        "{% endfor %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "empty": (
        "{% for message in messages %}"
        "{{ message['content'] + ((eos_token | default('')) if message['role'] == 'assistant' else '') }}"
        "{% endfor %}"
    ),
}
_RESERVED = ("conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "messages")


@dataclass(frozen=True)
class Template:
    """A chat template: how to speak of it, its Jinja source, and the special tokens that may end an answer."""

    name: str
    jinja: str
    ends: tuple[str, ...]


@dataclass(frozen=True)
class Rendered:
    """The text of one conversation. ``spans`` are the ``[start, end)`` characters that are learned, in order, each with the
    token that ends it and its weight."""

    text: str
    spans: tuple[tuple[int, int, float], ...]
    weight: float = 1.0


def resolve_template(template: str | None, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template that a setting stands for.

    None is the tokenizer's own, or ``base`` if it has none; ``native`` is the tokenizer's own; a name in ``NAMED``; a
    ``.jinja`` file; or Jinja source itself. A named template begins with BOS exactly if the tokenizer puts one; all
    others write it themselves, as chat templates do. Raises LimbeckError for anything else.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    ends = tuple(sorted(special | {tokenizer.eos_token} - {None}))
    if template is None:
        template = "native" if tokenizer.chat_template else "base"
    if template == "native":
        if not tokenizer.chat_template:
            raise LimbeckError(
                f"template: native needs a tokenizer with a chat template, and {tokenizer.name_or_path or 'this one'} "
                "has none; set template: base or template: chatml."
            )
        try:
            return Template("native", tokenizer.get_chat_template(), ends)
        except ValueError as error:  # several templates, none called "default"
            raise LimbeckError(f"template: native is ambiguous ({error}); give the path of a .jinja file.") from error
    if template in NAMED:
        return Template(template, ("{{ bos_token }}" if _puts_bos(tokenizer) else "") + NAMED[template], ends)
    if template.endswith(".jinja"):
        return Template(template, _read(Path(template).expanduser()), ends)
    if "{{" in template or "{%" in template:
        return Template("written in the configuration", template, ends)
    raise LimbeckError(
        f"template: {template} is unknown; use native, {', '.join(NAMED)}, the path of a .jinja file, or Jinja source."
    )


def render(
    conversation: Conversation,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any],
    where: str,
) -> tuple[Rendered, ...]:
    """The text of a conversation that has an answer, ending where its last answer ends, and the spans to learn.

    A span begins behind the generation prompt. If nothing in the template ends the last answer, the EOS token is
    appended, because a student that never saw an end does not stop. ``where`` names the row in errors; LimbeckError is
    raised if the template fails, or if its prompt is not the beginning of the whole text.
    """

    if conversation.plain:
        plain = conversation.messages[0]["content"] + (tokenizer.eos_token or "")
        return (Rendered(plain, ((0, len(plain), conversation.weight),), conversation.weight),)

    def text_of(turns: Sequence[Message], prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(
                list(turns),
                chat_template=template.jinja,
                tokenize=False,
                add_generation_prompt=prompt,
                **template_kwargs,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise LimbeckError(
                f"{where}: the chat template ({template.name}) cannot render this row: {error}"
            ) from error

    messages = conversation.messages
    whole = text_of(messages, prompt=False)
    last = len(messages) - 1
    text = whole.rstrip()
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = text_of(messages[:turn], prompt=True)
        until = text if turn == last else text_of(messages[: turn + 1], prompt=False).rstrip()
        if not whole.startswith(prompt) or not whole.startswith(until) or len(until) <= len(prompt):
            raise LimbeckError(
                f"{where}: the chat template ({template.name}) writes the text around turn {turn} (the assistant's) "
                "differently in a prompt and in the whole conversation, so the place of the answer is unknown; "
                "set template: chatml, or another one that never rewrites earlier turns."
            )
        spans.append((len(prompt), len(until), conversation.weight))
    if messages[last]["role"] == "assistant" and not text.endswith(template.ends):
        if tokenizer.eos_token is None:
            raise LimbeckError(
                f"The tokenizer {tokenizer.name_or_path} has no eos_token and the chat template ({template.name}) "
                "ends no answer, so the student could not learn to stop; set the tokenizer's eos_token."
            )
        text += tokenizer.eos_token
        spans[-1] = (spans[-1][0], len(text), spans[-1][2])
    return (Rendered(text, tuple(spans), conversation.weight),)


def check_template_kwargs(template_kwargs: Mapping[str, Any]) -> None:
    """Raise LimbeckError for a key that would replace an argument of the rendering itself."""
    for key in template_kwargs:
        if key in _RESERVED:
            raise LimbeckError(f"template_kwargs.{key} is set by the renderer itself; remove it.")


def _puts_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LimbeckError(f"template: {path} cannot be read ({error}); check the path.") from error
