"""How the processes of a run start: local ranks, groups of Ray workers."""
