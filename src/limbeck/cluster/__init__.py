"""Ray: where workers run, how they find each other, how tensors travel, what becomes of the dead. Not what is trained."""
