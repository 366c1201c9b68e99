"""Megatron-LM's checkpoints, formats ``torch_dist`` and ``torch``, read and written without megatron-core."""

from limbeck.models.megatron_checkpoint.load import load_weights, open_checkpoint

__all__ = ["load_weights", "open_checkpoint"]
