"""Captures the outputs of named submodules during a forward pass.

The forward hooks only keep a reference and are removed after the forward pass, so activation checkpointing recomputes
without them. Names are those of Hugging Face (``model.layers.3.mlp``), also under LoRA and FSDP. Some of Megatron's names are
translated.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.errors import LimbeckError
from limbeck.models.heads import hidden_states

STAR = "*"

MEGATRON: dict[str, tuple[str, ...]] = {
    "": ("",),
    "input_layernorm": ("input_layernorm", "ln_1"),
    "self_attention": ("self_attn", "attn", "attention"),
    "self_attention.linear_proj": ("self_attn.o_proj", "attn.c_proj", "attention.dense"),
    # A layer may have several of these; which one precedes the MLP depends on the model.
    "pre_mlp_layernorm": (
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
        "ln_2",
    ),
    "mlp": ("mlp", "feed_forward"),
    "mlp.linear_fc2": ("mlp.down_proj", "mlp.c_proj", "mlp.fc2", "mlp.dense_4h_to_h"),
}
"""Name after ``decoder.layers.<n>.`` in Megatron -> the possible names in a Hugging Face layer."""

MEGATRON_ENDS: dict[str, tuple[str, ...]] = {
    "decoder.final_layernorm": ("norm", "ln_f", "final_layernorm", "final_layer_norm"),
    "decoder.final_norm": ("norm", "ln_f", "final_layernorm", "final_layer_norm"),
    "embedding.word_embeddings": ("embed_tokens", "wte", "embed_in"),
}
"""Megatron's name outside the layers -> the possible names in a Hugging Face body."""

_LAYERS = re.compile(r"(?P<layers>(?:[^.]+\.)?(?:layers|h))\.0")
_MEGATRON_LAYER = re.compile(r"decoder\.layers\.(?P<number>\d+|\*)(?:\.(?P<rest>.+))?")


@dataclass(frozen=True)
class NamedPair:
    """One submodule of each model, and the loss between their outputs."""

    student: str
    teacher: str
    loss: str


@dataclass(frozen=True)
class HiddenStateCapture:
    """The submodules of one model body whose outputs are captured, in order. A name may occur more than once.

    A module is None where another pipeline stage holds it. Methods treat it as if it had not been named.
    """

    names: tuple[str, ...] = ()
    modules: tuple[nn.Module | None, ...] = ()
    role: str = "model"

    @classmethod
    def from_names(cls, trunk: nn.Module, names: Sequence[str], role: str) -> HiddenStateCapture:
        """Captures the submodules ``names`` of the body ``trunk``. ``role`` names the model in errors."""
        known = submodules(trunk)
        return cls(tuple(names), tuple(known[name] for name in names), role)

    @contextmanager
    def capture(self) -> Iterator[dict[str, Tensor]]:
        """Yields a dictionary that a forward pass inside the block fills: name -> output. Removes the hooks afterwards."""
        found: dict[str, Tensor] = {}
        handles = []
        try:
            for name, module in self._held().items():
                handles.append(module.register_forward_hook(partial(_keep, self, found, name)))
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def rows(self, found: dict[str, Tensor], shape: Sequence[int], positions: Tensor | None) -> tuple[Tensor, ...]:
        """Returns the captured outputs as [rows, width] tensors, one for each name.

        found:     from ``capture``; its entries are removed.
        shape:     [batch, time] of the input.
        positions: indices into the flattened [batch, time], or None for all.

        Raises LimbeckError for a submodule that did not run or whose output is not [batch, time, width].
        """
        return self.select(self.outputs(found, shape), positions)

    def outputs(self, found: dict[str, Tensor], shape: Sequence[int]) -> dict[str, Tensor]:
        """Returns the captured outputs as [batch, time, width] by name. Arguments and errors as for ``rows``."""
        outputs: dict[str, Tensor] = {}
        for name in self._held():
            if name not in found:
                raise LimbeckError(
                    f"features: {self.role} submodule {name} did not run in a forward pass; name one that does."
                )
            output = self.whole(found.pop(name), shape[1])
            if output.dim() != 3 or output.shape[:2] != torch.Size(shape):
                raise LimbeckError(
                    f"features: {self.role} submodule {name} gives {list(output.shape)} for a batch of {list(shape)} tokens, "
                    "which cannot be paired token by token; name one that gives [batch, time, width]."
                )
            outputs[name] = output
        return outputs

    def select(self, outputs: Mapping[str, Tensor], positions: Tensor | None) -> tuple[Tensor, ...]:
        """Returns ``outputs`` [batch, time, width] at flattened ``positions`` (None for all), one tensor for each name that
        has one.
        """
        flat = {name: output.flatten(0, 1) for name, output in outputs.items()}
        if positions is not None:
            flat = {name: output.index_select(0, positions) for name, output in flat.items()}
        return tuple(flat[name] for name in self.names if name in flat)

    def _held(self) -> dict[str, nn.Module]:
        named = zip(self.names, self.modules, strict=True)
        return {name: module for name, module in named if module is not None}

    def kept(self, output: Tensor) -> Tensor:
        """Returns what to keep of an output until the forward pass ends."""
        return output

    def whole(self, output: Tensor, time: int) -> Tensor:
        """Returns what a submodule gave as [batch, time, width]."""
        return output

    def probe(self, trunk: nn.Module) -> tuple[Tensor, ...]:
        """Returns the outputs [8, width] for two rows of four tokens, which show their widths and ``requires_grad``.

        Collective: every process must call it. Raises LimbeckError as ``rows`` does.
        """
        was_training = trunk.training
        trunk.eval()
        device = next(trunk.parameters()).device
        with self.capture() as found:
            hidden_states(trunk, torch.zeros(2, 4, dtype=torch.int64, device=device), None)
        trunk.train(was_training)
        return self.rows(found, (2, 4), None)

    def widths(self, trunk: nn.Module) -> list[int]:
        """Returns the width of each output. Collective, as ``probe``."""
        return [rows.shape[-1] for rows in self.probe(trunk)]


def _keep(
    taps: HiddenStateCapture, found: dict[str, Tensor], name: str, module: nn.Module, args: Any, output: Any
) -> None:
    """Forward hook that keeps a submodule's output."""
    role = taps.role
    if name in found:
        raise LimbeckError(
            f"features: {role} submodule {name} runs more than once in a forward pass, so its output is ambiguous; "
            "name another."
        )
    if not isinstance(output, Tensor):  # attention and older layers return (hidden, …), bodies an object with fields
        output = output[0]
    if not isinstance(output, Tensor):
        raise LimbeckError(f"features: {role} submodule {name} does not return a tensor; name another.")
    found[name] = taps.kept(output)


def submodules(trunk: nn.Module) -> dict[str, nn.Module]:
    """Returns every submodule of a body by its name in the whole model, such as ``model.layers.0.mlp``."""
    prefix = getattr(trunk, "base_model_prefix", "")
    if hasattr(trunk, prefix or "-"):  # the body is the whole model
        prefix = ""
    return {".".join(part for part in (prefix, name) if part): module for name, module in trunk.named_modules()}


def resolve_pairs(
    pairs: Sequence[Sequence[str]], student: Collection[str], teacher: Collection[str], default: str = "cosine"
) -> list[NamedPair]:
    """Resolves ``[student, teacher]`` or ``[student, teacher, loss]`` entries to pairs of submodules.

    A ``*`` stands for a layer number and must occur in both names. Models with the same number of layers are paired in order.
    If the teacher has k times as many, the student's layer i (from 1) is paired with the teacher's layer k·i, so the last
    layers are paired. Raises LimbeckError for other ratios, for unknown names, and for repeated pairs.
    """
    found: list[NamedPair] = []
    for entry in pairs:
        loss = entry[2] if len(entry) > 2 else default
        ours, theirs = _find(entry[0], student, "student"), _find(entry[1], teacher, "teacher")
        if (STAR in entry[0]) != (STAR in entry[1]):
            raise LimbeckError(
                f"features.pairs: [{entry[0]}, {entry[1]}] has a * on one side only, so the pairs of layers are ambiguous; "
                "write it on both sides, or name one layer on each."
            )
        if len(theirs) % len(ours):
            raise LimbeckError(
                f"features.pairs: [{entry[0]}, {entry[1]}] stands for {len(ours)} layers of the student and {len(theirs)} of "
                "the teacher, so the pairs are ambiguous; name each pair."
            )
        every = len(theirs) // len(ours)
        found += [NamedPair(s, t, loss) for s, t in zip(ours, theirs[every - 1 :: every], strict=True)]
    for pair in found:
        if found.count(pair) > 1:
            raise LimbeckError(
                f"features.pairs: {pair.student} and {pair.teacher} are paired twice with {pair.loss}; once is enough."
            )
    return found


def _find(name: str, known: Collection[str], role: str) -> list[str]:
    """Returns the submodules that ``name`` stands for: itself, or all that its * matches, by increasing number."""
    translated = name if _hits(name, known) else _from_megatron(name, known, role)
    if translated.count(STAR) > 1:
        raise LimbeckError(f"features.pairs: {name} has more than one *; use it for the layer number only.")
    hits = _hits(translated, known)
    if not hits:
        near = difflib.get_close_matches(translated.replace(STAR, "0"), sorted(known), n=3, cutoff=0.4)
        hint = f"nearest are {', '.join(near)}" if near else f"names look like {', '.join(sorted(known)[1:4])}"
        raise LimbeckError(f"features.pairs: the {role} has no submodule {name}; {hint}.")
    return hits


def _hits(name: str, known: Collection[str]) -> list[str]:
    if STAR not in name:
        return [name] if name in known else []
    pattern = re.compile(re.escape(name).replace(re.escape(STAR), r"(\d+)"))
    numbered = [(tuple(map(int, match.groups())), one) for one in known if (match := pattern.fullmatch(one))]
    return [one for _, one in sorted(numbered)]


def _from_megatron(name: str, known: Collection[str], role: str) -> str:
    """Translates a Megatron name to Hugging Face's; returns any other name unchanged."""
    stacks = sorted({match["layers"] for one in known if (match := _LAYERS.fullmatch(one))})
    layer = _MEGATRON_LAYER.fullmatch(name)
    if layer:
        endings = MEGATRON.get(layer["rest"] or "", ())
        candidates = [f"{stack}.{layer['number']}.{end}".rstrip(".") for stack in stacks for end in endings]
    elif name in MEGATRON_ENDS:
        prefixes = {stack.rpartition(".")[0] for stack in stacks}
        candidates = [f"{prefix}.{end}".lstrip(".") for prefix in prefixes for end in MEGATRON_ENDS[name]]
    else:
        return name
    there = [one for one in candidates if _hits(one, known)]
    if len(there) > 1:
        raise LimbeckError(
            f"features.pairs: Megatron's {name} could be {' or '.join(there)} in the {role}; write one of these."
        )
    return there[0] if there else name


def check_logit_layer(model: Any, name: str, role: str) -> None:
    """Raises LimbeckError unless ``name`` is the output head of ``model`` (``output_layer`` in Megatron)."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = causal.get_output_embeddings()
    modules = dict(causal.named_modules())
    own = next((known for known, module in modules.items() if module is head), "lm_head")
    if name in (own, "output_layer"):
        return
    known = f"{name} is a layer inside" if name in modules else f"it has no submodule {name}"
    raise LimbeckError(
        f"features.logit_layers: the {role}'s next-token distribution comes from its output head {own}, and {known}; "
        f"write {own}, and compare other layers with features.pairs."
    )
