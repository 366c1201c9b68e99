"""Generation with a trained student or any other model: chat, single prompts, and accuracy on questions and tasks."""
