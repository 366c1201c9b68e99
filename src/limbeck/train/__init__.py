"""The loop and what it leaves behind: checkpoints, metrics, logs. Knows every room below it, and none of their insides."""
