"""Megatron-LM's checkpoints, formats ``torch_dist`` and ``torch``, read and written without megatron-core."""

from limbeck.models.megatron_checkpoint.load import load_weights, open_checkpoint
from limbeck.models.megatron_checkpoint.write import arguments_of, loading_flags, write_checkpoint

__all__ = ["arguments_of", "load_weights", "loading_flags", "open_checkpoint", "write_checkpoint"]
