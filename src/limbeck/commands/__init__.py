"""Commands that have files of their own. Each file adds the arguments, and imports what it runs when it runs."""
