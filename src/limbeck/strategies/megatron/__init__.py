"""NVIDIA megatron-core: tensor, sequence, pipeline and data parallelism of dense decoders."""
