"""What a run would need on GPUs that are not here: memory, traffic and time of one rank, from its configuration alone."""
