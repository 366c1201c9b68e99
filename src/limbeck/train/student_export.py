"""The student as a Hugging Face folder: each rank writes whole layers of it, one file after the other.

``collect`` is called by every rank in the training loop, the ``write_`` methods later, in any thread: the configuration
first, since transformers removes files of weights when it writes that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from limbeck.strategies.world import World
from limbeck.train.tensor_files import stored_dtype, write_tensors

# The least and the most that a file is planned for, in bytes; it ends with the layer that fills it.
_LEAST, _MOST = 64 << 20, 1 << 30
_LAYER = re.compile(r".*?\.\d+\.")


@dataclass
class ExportShare:
    """What this rank writes: tensors on the CPU, by file. files: number of files of the whole student."""

    tensors: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    files: int = 0


@dataclass(frozen=True)
class StudentExport:
    """Writes ``model``, a plain Hugging Face model, in the precision ``dtype``.

    num_parameters: of the whole model. Every rank writes a file of its share of them, or several, or small models in fewer.
    """

    model: Any
    dtype: torch.dtype
    num_parameters: int

    def collect(
        self, weights: Iterable[tuple[str, Tensor]], world: World, on_host: Mapping[str, Tensor]
    ) -> ExportShare:
        """Copy this rank's share of ``weights`` to the CPU, in ``dtype``. Collective.

        Args:
            weights: names and full tensors, the same on every rank.
            world: the ranks.
            on_host: whole tensors, in any precision, of which there are copies already.
        """
        tied, share = set(self.model.all_tied_weights_keys), ExportShare()
        file_bytes = min(max(self.num_parameters * self.dtype.itemsize // world.size, _LEAST), _MOST)
        number, size, layer = 0, 0, ""
        for name, tensor in weights:
            if name in tied:
                continue
            of_layer = match[0] if (match := _LAYER.match(name)) else ""
            # Layers stay together: transformers converts the names and shapes of some models' parameters layer by layer.
            if of_layer != layer and size >= file_bytes:
                number, size = number + 1, 0
            layer = of_layer
            size += tensor.numel() * self.dtype.itemsize
            if number % world.size == world.rank:
                held = on_host.get(name)
                dtype = stored_dtype(tensor, self.dtype)
                copied = tensor.detach().to("cpu", dtype, copy=True) if held is None else held
                share.tensors.setdefault(number, {})[name] = copied
        share.files = number + 1
        return share

    def write_configuration(self, folder: Path) -> None:
        """Write what is beside the weights."""
        self.model.save_pretrained(folder, state_dict={})
        # save_pretrained writes the precision of the model to config.json, not that of the tensors.
        described = json.loads((folder / "config.json").read_text())
        described["dtype"] = str(self.dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")

    def write_weights(self, folder: Path, share: ExportShare) -> dict[str, dict[str, Any]]:
        """Write this rank's files.

        Returns:
            For each file its fingerprint, and under ``bytes`` the size of each of its tensors.
        """
        written = {}
        ignored = set(getattr(self.model, "_keys_to_ignore_on_save", None) or ())
        for number, tensors in share.tensors.items():
            name = (
                "model.safetensors" if share.files == 1 else f"model-{number + 1:05d}-of-{share.files:05d}.safetensors"
            )
            kept = {key: tensor for key, tensor in tensors.items() if key not in ignored}
            state = revert_weight_conversion(self.model, kept)
            written[name] = {
                "fingerprint": write_tensors(folder / name, state, {"format": "pt"}, self.dtype),
                "bytes": {
                    key: value.numel() * stored_dtype(value, self.dtype).itemsize for key, value in state.items()
                },
            }
        return written

    def write_index(self, folder: Path, written: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the index of all ranks' files, if there are several."""
        if len(written) > 1:
            sizes = {key: size for file in written.values() for key, size in file["bytes"].items()}
            index = {
                "metadata": {"total_size": sum(sizes.values())},
                "weight_map": {key: name for name, file in written.items() for key in file["bytes"]},
            }
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
