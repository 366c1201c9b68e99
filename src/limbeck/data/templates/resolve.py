"""Resolves a template setting, and the text that is added around a conversation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING

from limbeck.data.templates.named import (
    LONG_COT,
    LONG_COT_OPENING,
    LONG_COT_QUESTION,
    LONG_COT_SYSTEM,
    MARKERS,
    NAMED,
    QWEN,
)
from limbeck.errors import LimbeckError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Template:
    """A chat template and its settings.

    name:       its name in messages.
    jinja:      its source.
    with_tools: its source for rows with tools, if different.
    ends:       special tokens that may end an answer.
    bos:        text at the start of plain text.
    system:     system message of conversations without one.
    question:   text before and after the first question.
    last_only:  supervise only the last answer.
    note:       a warning about this template with this tokenizer, or empty.
    """

    name: str
    jinja: str
    ends: tuple[str, ...]
    with_tools: str | None = None
    bos: str = ""
    system: str | None = None
    question: tuple[str, str] = ("", "")
    last_only: bool = False
    note: str = ""


def resolve_template(
    template: str | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    default_system: str | None = None,
    prompt_file: str | None = None,
    train_on: str = "all",
) -> Template:
    """Returns the template of a setting.

    template:       None for the tokenizer's own, or ``base`` if it has none; ``native`` for the tokenizer's own; a name in
                    ``NAMED`` or ``LONG_COT``; a ``.jinja`` file; or Jinja source. A named template begins with BOS if the
                    tokenizer adds BOS; all others write it themselves.
    default_system: system message of conversations without one.
    prompt_file:    text file with one ``{}`` for the question.
    train_on:       "all" answers or the "last".

    Raises LimbeckError for any other template, and for a file that cannot be read.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    ends = tuple(sorted(special | {tokenizer.eos_token} - {None}))
    name, jinja, with_tools = _source(template, tokenizer)
    question, system = ("", ""), default_system
    if name == "longCOT_qwen2.5":
        question, system = LONG_COT_QUESTION, LONG_COT_SYSTEM if default_system is None else default_system
    if prompt_file is not None:
        question = _around_the_question(Path(prompt_file).expanduser())
    bos = str(tokenizer.bos_token) if _puts_bos(tokenizer) else ""
    note = _note_on_markers(name, tokenizer)
    return Template(name, jinja, ends, with_tools, bos, system, question, train_on == "last", note)


def _source(template: str | None, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str | None]:
    """Returns name, Jinja source, and Jinja source for rows with tools (None: the same)."""
    if template is None:
        template = "native" if tokenizer.chat_template else "base"
    if template == "native" or template in LONG_COT:
        return template, *_native(template, tokenizer)
    if template in NAMED:
        own = tokenizer.chat_template
        if template in QWEN and isinstance(own, str) and QWEN[template] in own:
            return f"{template}, the tokenizer's own", own, None
        return template, ("{{ bos_token }}" if _puts_bos(tokenizer) else "") + NAMED[template], None
    if template.endswith(".jinja"):
        return template, _read(Path(template).expanduser(), "template"), None
    if "{{" in template or "{%" in template:
        return "written in the configuration", template, None
    raise LimbeckError(
        f"template: {template} is unknown; use native, {', '.join([*NAMED, *LONG_COT])}, the path of a .jinja file, "
        "or Jinja source."
    )


def _native(name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str | None]:
    if not tokenizer.chat_template:
        raise LimbeckError(
            f"template: {name} needs a tokenizer with a chat template, and {tokenizer.name_or_path or 'this one'} "
            "has none; set template: base or template: chatml."
        )
    try:
        jinja, with_tools = tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[])
    except ValueError as error:  # several templates, none called "default"
        raise LimbeckError(f"template: {name} is ambiguous ({error}); give the path of a .jinja file.") from error
    if name == "longcot_V3":
        # Jinja removes one newline at the end of a source; remove it here too, because text is appended.
        jinja, with_tools = (source.removesuffix("\n") + LONG_COT_OPENING for source in (jinja, with_tools))
    return jinja, None if with_tools == jinja else with_tools


def _note_on_markers(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    lacking = [marker for marker in MARKERS.get(name, ()) if marker not in tokenizer.get_vocab()]
    if not lacking:
        return ""
    return (
        f"the tokenizer has no token for {' and '.join(lacking)}, which template: {name} uses, so each becomes several "
        "tokens of ordinary text; use a template of the tokenizer's family to avoid that."
    )


def _around_the_question(path: Path) -> tuple[str, str]:
    """Returns the text of a prompt file before and after the question. Literal braces are doubled, as in format strings."""
    advice = f"prompt_file: {path} must contain {{}} for the question exactly once, and {{{{ }}}} for literal braces"
    parts = [""]
    try:
        for text, field, specification, conversion in Formatter().parse(_read(path, "prompt_file")):
            parts[-1] += text
            if field is not None:
                if field or specification or conversion:
                    raise LimbeckError(f"{advice}; it has {{{field}}}.")
                parts.append("")
    except ValueError as error:
        raise LimbeckError(f"{advice} ({error}).") from error
    if len(parts) != 2:
        raise LimbeckError(f"{advice}; it has {{}} {len(parts) - 1} times.")
    return parts[0], parts[1]


def _puts_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


def _read(path: Path, setting: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LimbeckError(f"{setting}: {path} cannot be read ({error}); check the path.") from error
