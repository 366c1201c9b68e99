"""The generator ``hf``: a transformers model in the training process, with a decode loop of its own.

    generator = HfGenerator(model_outline(source, torch.float32), tokenizer)
    generator.update_weights(engine.iter_weights(), version=step)
    completions = generator.generate(prompts, SamplingParams(max_tokens=256))

Batching is continuous: completions are written in a fixed number of slots, and where one ends, the next prompt takes its
slot at once, so a long completion does not hold up the others. Prompts are ordered by length and prefilled in groups
without their last token; that token is the first input of decoding. The samples of a prompt copy its keys and values
from each other while one of them is still being written.

A token's random number depends only on the seed, the row id, the number of the sample and the position. The same
completions are therefore written for any batch and any number of slots, up to rounding of the logits.

The generator has no weights until ``update_weights`` is called; no checkpoint is read. ``LockstepGenerator`` needs none: it
writes with the modules of the student itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from limbeck.config import DistillConfig
from limbeck.errors import LimbeckError
from limbeck.models import body, unwrap_model
from limbeck.rollout.decode_graphs import DecodeGraphs
from limbeck.rollout.generator import Completion, Prompt, SamplingParams, most_new_tokens
from limbeck.rollout.kv_cache import SLOT_ATTENTION, Decode, Prefill, SlotCache
from limbeck.rollout.recurrent_cache import keep_states_in_slots, states_in_slots
from limbeck.rollout.sampling import sample_tokens
from limbeck.rollout.student import end_token_ids, num_tokens, student_outline
from limbeck.rollout.weights import SharedWeights, transposed_linears
from limbeck.strategies.base import Engine
from limbeck.strategies.fsdp2 import reshard
from limbeck.strategies.world import World

T = TypeVar("T")

_PREFILL_TOKENS = 8192
"""Most tokens of one prefill, padding included; a longer prompt is prefilled alone."""

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_HYBRIDS = {"nemotron_h": {"linear_attention", "mlp", "moe"}}
"""``model_type`` to further kinds of layers, for models whose recurrent layers take their states from a cache."""


@dataclass(eq=False)
class _Row:
    """A completion that is being written.

    index: of the prompt. max_tokens: that it may have. random: gives one number for each token.
    """

    prompt: Prompt
    index: int
    max_tokens: int
    random: np.random.Generator
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finished: bool = False

    @property
    def next_input(self) -> int:
        """The token that is decoded next."""
        return self.token_ids[-1] if self.token_ids else self.prompt.token_ids[-1]

    @property
    def position(self) -> int:
        """Of ``next_input``, and the number of positions in the cache."""
        return len(self.prompt.token_ids) + len(self.token_ids) - 1

    @property
    def ended(self) -> bool:
        return self.finished or len(self.token_ids) >= self.max_tokens


class HfGenerator:
    """Writes completions with a causal language model of transformers; see the module docstring.

    Args:
        model: its structure on the meta device, in the dtype to compute in; see ``model_outline``.
        tokenizer: finds stop strings. Its end token, and those of the model's generation configuration, end a completion.
        device: where to compute.
        slots: number of completions that are written at the same time. The cache holds as many, each as long as the
            longest prompt with max_tokens.
        max_length: most tokens of a prompt and its completion; the model's positions if it has fewer, or if None.

    Raises:
        LimbeckError: if the model keeps state other than keys and values.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        device: torch.device | str = "cpu",
        slots: int = 64,
        max_length: int | None = None,
    ) -> None:
        _check_layers(model)
        config = model.config.get_text_config()
        self.version = 0
        self._device, self._slots, self._tokenizer = torch.device(device), slots, tokenizer
        self.model = deepcopy(model).eval()  # its configuration, which is changed, may belong to another model too
        self._recurrent = _use_slots(self.model)
        self._weights = SharedWeights(self.model, self._device)
        self._has_weights = False
        limits = [
            limit for limit in (getattr(config, "max_position_embeddings", None), max_length) if limit is not None
        ]
        self._max_length = min(limits, default=None)
        self._records_graphs = self._device.type == "cuda"
        self._num_tokens = num_tokens(tokenizer)
        self._end_ids = end_token_ids(model, tokenizer)

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See ``Generator``. A tensor of the generator's dtype and device is shared, not copied."""
        self._weights.load(weights)
        self._has_weights, self.version = True, version

    def offload(self) -> None:
        """Move the weights to host memory. There is no cache between calls of ``generate``."""
        if self._has_weights and self._device.type != "cpu":
            self._weights.to("cpu")
            torch.cuda.empty_cache()

    def reload(self) -> None:
        """The inverse of ``offload``; call it before ``update_weights`` and ``generate``."""
        if self._has_weights:
            self._weights.to(self._device)

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        """See ``Generator``. A completion also ends, not finished, where the model's positions or max_length do.

        Raises:
            LimbeckError: if a prompt is empty or leaves no position for a token.
        """
        rows = [row for index, prompt in enumerate(prompts) for row in self._make_rows(index, prompt, sampling)]
        waiting = deque(sorted(rows, key=lambda row: -len(row.prompt.token_ids)))
        cache = SlotCache(
            min(self._slots, len(rows)),
            max((len(row.prompt.token_ids) + row.max_tokens - 1 for row in rows), default=0),
        )
        graphs = DecodeGraphs(self._next_logits, cache, records=self._records_graphs)
        active: list[_Row] = []  # by slot
        with self._writing():
            while waiting or active:
                added = [waiting.popleft() for _ in range(min(len(waiting), cache.slots - len(active)))]
                if added:
                    self._admit(added, active, cache)
                self._decode(active, graphs, sampling)
                active = _remove_ended(active, cache)
        self._records_graphs = graphs.records
        return [
            Completion(row.prompt, tuple(row.token_ids), tuple(row.log_probs), row.finished, self.version)
            for row in rows
        ]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """In the block, ``_forward`` may be called."""
        if not self._has_weights:
            raise LimbeckError("the generator has no weights yet; call update_weights before generate.")
        transposed = transposed_linears(self.model) if self._device.type == "cpu" else nullcontext()
        with torch.inference_mode(), transposed:
            yield

    def _forward(self, compute: Callable[[Any], T]) -> T:
        """``compute(model)``, which is one forward pass of the model."""
        return compute(self.model)

    def _next_logits(self, ids: Tensor, positions: Tensor, slots: Decode) -> Tensor:
        """Logits [rows, vocabulary] after one more token of each row."""
        inputs = {"input_ids": ids, "position_ids": positions[:, None], "use_cache": False, "slots": slots}
        logits: Tensor = self._forward(lambda model: model(**inputs).logits)
        return logits[:, 0]

    def _make_rows(self, index: int, prompt: Prompt, sampling: SamplingParams) -> list[_Row]:
        most = most_new_tokens(prompt, sampling, self._max_length)
        return [
            _Row(prompt, index, most, np.random.default_rng((sampling.seed, prompt.row_id, sample)))
            for sample in range(sampling.n)
        ]

    def _admit(self, added: list[_Row], active: list[_Row], cache: SlotCache) -> None:
        """Append ``added`` to ``active`` and fill their slots with their prompts, but for the last tokens."""
        # The states of a row that is being written have gone on from its prompt.
        slot_of = {} if self._recurrent else {row.index: slot for slot, row in enumerate(active)}
        new: list[int] = []
        copies: list[tuple[int, int]] = []
        for row in added:
            slot = len(active)
            active.append(row)
            if slot_of.setdefault(row.index, slot) != slot:
                copies.append((slot_of[row.index], slot))
            elif row.position > 0:
                new.append(slot)
            else:
                cache.clear(slot)
        while new:
            longest = active[new[0]].position
            count = max(1, _PREFILL_TOKENS // longest)
            # Lengths only fall. A group ends where padding would be a quarter of a row.
            shortest = longest if self._recurrent else -(-longest * 3 // 4)
            group = [slot for slot in new[:count] if active[slot].position >= shortest]
            new = new[len(group) :]
            ids = [[*active[slot].prompt.token_ids[:-1]] for slot in group]
            padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=self._device)
            self._forward(partial(_prefill, ids=padded, slots=Prefill(cache, group)))
        if copies:
            sources, targets = zip(*copies, strict=True)
            cache.copy(sources, targets, max(len(active[slot].prompt.token_ids) for slot in targets))

    def _decode(self, rows: list[_Row], graphs: DecodeGraphs, sampling: SamplingParams) -> None:
        """Write one token to every row."""
        ids = torch.tensor([[row.next_input] for row in rows], device=self._device)
        positions = torch.tensor([row.position for row in rows], device=self._device)
        draws = torch.tensor([row.random.random() for row in rows], dtype=torch.float64, device=self._device)
        logits = graphs.logits(ids, positions, max(row.position for row in rows))
        tokens, log_probs = sample_tokens(logits[:, : self._num_tokens], draws, sampling)
        for row, token, log_prob in zip(rows, tokens.tolist(), log_probs.tolist(), strict=True):
            row.token_ids.append(token)
            row.log_probs.append(log_prob)
            row.finished = (
                token in self._end_ids
                or token in sampling.stop_token_ids
                or self._completes_stop_string(row.token_ids, sampling.stop_strings)
            )

    def _completes_stop_string(self, token_ids: list[int], stop_strings: Collection[str]) -> bool:
        if not stop_strings:
            return False
        # A token has at least one byte. The one before the stop string may change how its first token is decoded.
        count = 1 + max(len(stop.encode()) for stop in stop_strings)
        text = self._tokenizer.decode(token_ids[-count:], clean_up_tokenization_spaces=False)
        return any(stop in text for stop in stop_strings)


class LockstepGenerator(HfGenerator):
    """Writes with the student that is trained, in place of a copy of its weights.

    Each forward pass of a sharded student gathers its layers, so that all ranks that share it must run equally many. A rank
    whose completions have ended runs a token of its own until the others have ended too. Adapters stay unmerged, and the
    layers run uncompiled.

    Args:
        model, tokenizer, slots, max_length: see ``HfGenerator``; the model only describes the student.
        world: the processes of the student.
    """

    def __init__(
        self, model: Any, tokenizer: Any, world: World, slots: int = 64, max_length: int | None = None
    ) -> None:
        super().__init__(model, tokenizer, world.device, slots, max_length)
        self._world, self._records_graphs = world, False  # a pass gathers layers from other ranks
        self._engine: Engine | None = None

    def use_student(self, engine: Engine, version: int) -> None:
        """See ``InPlaceGenerator``."""
        self._engine, self.version = engine, version

    @contextmanager
    def _writing(self) -> Iterator[None]:
        if self._engine is None:
            raise LimbeckError("the generator has no student yet; call use_student before generate.")
        root: Any = self._engine.root
        model, was_training = unwrap_model(root.model), root.training
        own = model.config._attn_implementation
        model.set_attn_implementation(SLOT_ATTENTION)
        try:
            # Not in inference mode: FSDP keeps some of the tensors that it makes here, and training needs them.
            with torch.no_grad(), torch.compiler.set_stance("force_eager"), states_in_slots(model):
                try:
                    yield
                finally:  # also after an error between two passes: the other ranks go on
                    ids = torch.zeros(1, 1, dtype=torch.long, device=self._device)
                    while self._world.max(0):
                        self._engine.evaluate(partial(_prefill, ids=ids, slots=Prefill(SlotCache(1, 1), [0])))
        finally:
            model.set_attn_implementation(own)
            root.train(was_training)
            reshard(root)

    def _forward(self, compute: Callable[[Any], T]) -> T:
        assert self._engine is not None
        self._world.max(1)  # the others run a pass too
        return self._engine.evaluate(lambda model: compute(unwrap_model(model)))  # type: ignore[return-value]


def cache_bytes(model: Any, slots: int, positions: int) -> int:
    """Bytes of the cache of ``slots`` completions whose last token is at most at position ``positions``.

    One token is prefilled, which allocates all of it.

    Args:
        model: on fake tensors, in the dtype to compute in; it is changed.
        slots, positions: see above.

    Raises:
        LimbeckError: if the model keeps state other than keys and values.
    """
    _check_layers(model)
    _use_slots(model.eval())
    cache = SlotCache(slots, positions)
    with torch.no_grad():
        _prefill(model, torch.zeros(1, 1, dtype=torch.long, device=model.device), Prefill(cache, [0]))
    return cache.nbytes


def _check_layers(model: Any) -> None:
    config = model.config.get_text_config()
    unknown = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES - _HYBRIDS.get(config.model_type, set())
    if unknown or not (model._supports_attention_backend or config.model_type in _HYBRIDS):
        raise LimbeckError(
            f"the generator hf caches keys and values of full and sliding window attention, and states of Mamba layers of "
            f"{', '.join(_HYBRIDS)}, only, and "
            f"{type(model).__name__} has {', '.join(sorted(unknown)) or 'an attention of its own'}; use another generator."
        )


def _use_slots(model: Any) -> bool:
    """Let the layers of ``model`` keep their state in slots; returns whether some are recurrent."""
    model.set_attn_implementation(SLOT_ATTENTION)
    return keep_states_in_slots(model)


def _prefill(model: Any, ids: Tensor, slots: Prefill) -> None:
    """One forward pass of ``model`` over prompts, which writes their keys and values. ids: [prompts, time]."""
    body(model)(input_ids=ids, use_cache=False, slots=slots)


def _remove_ended(rows: list[_Row], cache: SlotCache) -> list[_Row]:
    """The rows that go on, moved to the first slots."""
    kept = [slot for slot, row in enumerate(rows) if not row.ended]
    free = [slot for slot in range(len(kept)) if rows[slot].ended]
    moved = kept[len(kept) - len(free) :]  # the last ones; as many lie after the first len(kept) slots
    if moved:
        cache.copy(moved, free, max(rows[slot].position for slot in moved))
        for source, target in zip(moved, free, strict=True):
            rows[target] = rows[source]
    return rows[: len(kept)]


def make_generator(config: DistillConfig, world: World) -> HfGenerator:
    """The generator of a run's student, without weights. ``rollout.generator_kwargs`` may set ``slots`` and ``copy``."""
    slots = config.rollout.slots if config.rollout else 64
    model, tokenizer = student_outline(config, world)
    if config.rollout is not None and config.rollout.in_lockstep:
        return LockstepGenerator(model, tokenizer, world, slots, config.sequence_length)
    return HfGenerator(model, tokenizer, world.device, slots, config.sequence_length)
