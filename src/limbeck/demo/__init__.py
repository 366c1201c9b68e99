"""The demonstration: a small teacher, a smaller student and problems made on the spot, with nothing to download."""
