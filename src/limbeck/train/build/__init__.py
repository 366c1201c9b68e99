"""Builds a run from its configuration: data, objective, teacher, student."""
