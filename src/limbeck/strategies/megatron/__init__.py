"""NVIDIA megatron-core: tensor, sequence, pipeline and data parallelism of decoders, and expert parallelism of mixtures."""
