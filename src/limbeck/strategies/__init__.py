"""How one model is spread over processes and devices. Knows modules and process groups; knows nothing of distillation."""
