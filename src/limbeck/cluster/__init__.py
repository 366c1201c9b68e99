"""Ray: placement, groups of workers, health checks, transfer of tensors. Nothing here knows what is trained."""
