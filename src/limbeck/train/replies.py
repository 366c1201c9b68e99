"""The tokens of a reply: the turn of the environment in a conversation, and the beginning of the student's next turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from limbeck.config import DistillConfig
from limbeck.data.rows import Conversation
from limbeck.data.templates import render, resolve_template
from limbeck.errors import LimbeckError

_MARK = "\ue000the answer\ue001"  # private-use characters, which templates do not change


class ReplyRenderer:
    """Renders replies with the chat template of the data, as a tool's turn where the template has one, else as a user's.

    The student's own tokens are not rendered again, so they stay as it wrote them.

    Raises:
        LimbeckError: if the template has no turn for a reply.
    """

    def __init__(self, config: DistillConfig, tokenizer: Any) -> None:
        args = config.student.data_args
        self._tokenizer, self._kwargs = tokenizer, args.template_kwargs
        self._template = resolve_template(
            args.template,
            tokenizer,
            default_system=args.default_system,
            prompt_file=args.prompt_file,
            train_on=args.train_on,
        )
        probe = "\ue000the reply\ue001"
        for self._role in ("tool", "user"):
            try:
                if probe in self._after_answer(probe):
                    return
            except LimbeckError as error:  # a template may refuse the role
                failure: LimbeckError | None = error
            else:
                failure = None
        raise LimbeckError(
            f"rollout.max_turns: the chat template ({self._template.name}) renders neither a tool's nor a user's turn after an "
            "answer; set student.data_args.template."
        ) from failure

    def tokens(self, completion: Sequence[int], reply: str) -> list[int]:
        """The token ids that follow ``completion``: the end of its turn, unless it wrote that, the reply, and the generation
        prompt.
        """
        encoded = self._tokenizer.encode(self._after_answer(reply), add_special_tokens=False)
        ids = [int(token) for token in encoded]
        return ids[1:] if completion and ids[:1] == [completion[-1]] else ids

    def _after_answer(self, reply: str) -> str:
        messages = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": _MARK},
            {"role": self._role, "content": reply},
        ]
        conversation = Conversation(messages, is_prompt=True)
        text = render(conversation, self._template, self._tokenizer, self._kwargs, "a reply of the environment")[0].text
        return text.partition(_MARK)[2]
