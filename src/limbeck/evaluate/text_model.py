"""A model with its tokenizer and chat template, which reads and writes text as in training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from limbeck.data import TokenizeSettings, make_encoder
from limbeck.data.encode import Encoder
from limbeck.data.rows import Conversation, Message
from limbeck.data.templates import render
from limbeck.data.templates.named import LONG_COT
from limbeck.errors import LimbeckError
from limbeck.models import ModelSource, load_model, load_tokenizer, model_outline
from limbeck.rollout.generator import Completion, Prompt, SamplingParams
from limbeck.rollout.hf import HfGenerator
from limbeck.rollout.student import end_token_ids
from limbeck.train.checkpoint import MANIFEST, TRAINING
from limbeck.train.push import find_student


@dataclass(frozen=True)
class TextModel:
    """A model that continues texts.

    name: for people, such as ``checkpoint-50``. run: the output folder of its run, or None. source: where it was loaded
    from. encoder: renders conversations. ends: tokens that end an answer.
    """

    name: str
    run: Path | None
    source: ModelSource
    model: Any
    encoder: Encoder
    ends: frozenset[int]

    @classmethod
    def load(
        cls, name: str, checkpoint: str | None = None, *, device: str | None = None, trust_remote_code: bool = False
    ) -> TextModel:
        """Load a student or another model; in bfloat16 on a GPU, in float32 on a CPU.

        Args:
            name: output folder of a run, a checkpoint in it, another folder, or a Hugging Face id.
            checkpoint: name of the run's checkpoint, such as ``best``; by default the newest.
            device: such as ``cpu``; by default the GPU if there is one.

        Raises:
            LimbeckError: if it cannot be loaded.
        """
        folder, run, config = Path(name), None, {}
        if (folder / "run.json").is_file() or (folder / MANIFEST).is_file():
            folder = find_student(folder, checkpoint)
            config = json.loads((folder / TRAINING / "state.json").read_text(encoding="utf-8"))["config"]
            around = (Path(name), folder.resolve().parent, Path(config["output_dir"]))
            run = next((place for place in around if (place / "run.json").is_file()), None)
        elif checkpoint is not None:
            raise LimbeckError(f"--checkpoint {checkpoint} needs a run, and {name} has no run.json; remove it.")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        path = str(folder) if config else name
        source = ModelSource(path, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(source)
        try:
            model = load_model(source, _dtype(device)).to(device).eval()
        except RuntimeError as error:  # CUDA is not there, or its memory is too small
            raise LimbeckError(f"{name} cannot be moved to the device {device}: {error}") from error
        encoder = make_encoder(tokenizer, _settings(config))
        label = folder.resolve().name if folder.is_dir() else name
        return cls(label, run, source, model, encoder, frozenset(_ends(model, encoder)))

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.encoder.tokenizer

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text after which the model answers the last of ``messages``."""
        return _render(self.encoder, messages, is_prompt=True)

    def stream(self, text: str, sampling: SamplingParams) -> str:
        """Print the continuation of ``text`` while it is written, and return it.

        Raises:
            LimbeckError: if ``text`` leaves no room for a continuation.
        """
        from transformers import GenerationConfig, TextStreamer

        ids = self._encode(text)
        tokens = torch.tensor([ids], device=self.model.device)
        sampled = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        settings = GenerationConfig(
            max_new_tokens=min(sampling.max_tokens, self._room(len(ids))),
            do_sample=sampling.temperature > 0,
            eos_token_id=sorted(self.ends),
            pad_token_id=self.tokenizer.pad_token_id,
            **(sampled if sampling.temperature > 0 else {}),
        )
        output = self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            generation_config=settings,
            streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
        return str(self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))

    def write(self, texts: Sequence[str], sampling: SamplingParams, slots: int = 64) -> list[Completion]:
        """``sampling.n`` continuations of each of ``texts``, in order. slots: how many are written at the same time."""
        dtype = next(self.model.parameters()).dtype
        generator = HfGenerator(model_outline(self.source, dtype), self.tokenizer, self.model.device, slots)
        generator.update_weights(self.model.state_dict().items(), version=0)
        prompts = [Prompt(tuple(self._encode(text)), number) for number, text in enumerate(texts)]
        return generator.generate(prompts, replace(sampling, stop_token_ids=tuple(sorted(self.ends))))

    def decode(self, completion: Completion) -> str:
        """The text of a completion, without end tokens."""
        return str(self.tokenizer.decode(list(completion.token_ids), skip_special_tokens=True))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _room(self, length: int) -> int:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and length >= limit:
            raise LimbeckError(
                f"the prompt has {length} tokens, and {self.name} reads {limit}; write a shorter one, or begin again."
            )
        return 2**31 if limit is None else limit - length


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device.startswith("cpu") else torch.bfloat16


def _settings(config: Mapping[str, Any]) -> TokenizeSettings:
    """How the run of ``config`` turns a question into text. The saved tokenizer has its chat template."""
    if not config:
        return TokenizeSettings(prompts=True)
    args = config["student"]["data_args"]
    return TokenizeSettings(
        template=args["template"] if args["template"] in LONG_COT else None,
        template_kwargs=args["template_kwargs"],
        default_system=args["default_system"],
        prompt_file=args["prompt_file"],
        question_key=config["question_key"],
        answer_key=config["answer_key"],
        prompt_key=config["prompt_key"],
        system_key=config["system_key"],
        prompts=True,
    )


def _render(encoder: Encoder, messages: Sequence[Message], *, is_prompt: bool) -> str:
    conversation = Conversation(list(messages), is_prompt=is_prompt)
    kwargs = encoder.settings.template_kwargs
    (rendered,) = render(conversation, encoder.template, encoder.tokenizer, kwargs, "the conversation")
    return rendered.text


def _ends(model: Any, encoder: Encoder) -> set[int]:
    """The end tokens of the model, and the one with which the template ends an answer."""
    tokenizer = encoder.tokenizer
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = _render(encoder, messages, is_prompt=False)
    last = tokenizer(text, add_special_tokens=False)["input_ids"][-1]
    added = tokenizer.added_tokens_decoder.get(last)
    return end_token_ids(model, tokenizer) | ({last} if added is not None and added.special else set())
