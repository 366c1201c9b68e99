"""What a run would need on GPUs that are not here."""
