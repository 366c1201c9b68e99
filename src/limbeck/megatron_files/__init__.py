"""The files of Megatron-LM's checkpoints, and the arguments that they store."""
